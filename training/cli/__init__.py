"""Every program's options, errors, files, names and device."""
