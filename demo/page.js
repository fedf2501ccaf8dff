// The page's own log: milliseconds from a movement of a slider to the picture that follows from it.
(() => {
  let started = null;
  const times = [];
  document.addEventListener("input", (event) => {
    if (event.target.closest(".live")) started = performance.now();
  }, true);
  document.addEventListener("load", (event) => {
    const image = event.target;
    if (image.tagName !== "IMG" || !image.closest(".pixels")) return;
    if (!image.alt) image.alt = "Picture. The words below it say how it was made.";
    if (started === null) return;
    requestAnimationFrame(() => {
      if (started === null) return;
      times.push(performance.now() - started);
      started = null;
      const last = times.slice(-50).sort((a, b) => a - b);
      const text = `Slider to picture: ${times.at(-1).toFixed(0)} ms (middle of the last ${last.length}: ${last[last.length >> 1].toFixed(0)} ms).`;
      const log = document.getElementById("latency");
      if (log) log.textContent = text;
      console.info(text);
    });
  }, true);

  const press = (selector) => {
    const button = [...document.querySelectorAll(selector)].find((one) => one.offsetParent !== null);
    if (button) button.click();
  };
  // Nothing runs, and the address stays, until the page has taken over what its address says.
  let restored = false;
  window.ctmRun = () => press("button.run");
  window.ctmRunLive = () => restored && setTimeout(() => press("button.run.at-once"), 50);
  window.ctmRestored = () => { restored = true; window.ctmRunLive(); };

  // A run that is under way with other values than those now shown is told to end; gradio then starts one with these.
  const visit = [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("");
  const running = {};
  let turns = 0;
  window.ctmStarts = (tab, values) => {
    const controls = values.slice(0, -1), turn = `${visit}-${++turns}`;
    running[tab] = { turn, controls: JSON.stringify(controls) };
    return [...controls, turn];
  };
  window.ctmMoved = (tab, controls) => {
    const run = running[tab];
    if (!run || run.controls === JSON.stringify(controls)) return;
    delete running[tab];
    const { root, api_prefix } = window.gradio_config;
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ data: [run.turn] }) };
    fetch(`${root}${api_prefix}/run/stop`, options).catch(() => {});
  };

  const seeds = [];
  window.ctmNewSeed = (seed) => { seeds.push(seed); return Math.floor(Math.random() * 2 ** 31); };
  window.ctmLastSeed = (seed) => seeds.length ? seeds.pop() : seed;

  window.ctmRemember = (tab, names, values) => {
    delete running[tab];
    const query = new URLSearchParams(location.search);
    for (const name of [...query.keys()]) if (!name.startsWith("__")) query.delete(name);
    query.set("tab", tab);
    names.forEach((name, i) => { if (values[i] !== null && values[i] !== undefined) query.set(name, values[i]); });
    history.replaceState(null, "", `${location.pathname}?${query}`);
    return location.href;
  };
})();
