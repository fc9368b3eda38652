"""Import and export for other SAE libraries: their file formats, to and from a `Dictionary`."""
