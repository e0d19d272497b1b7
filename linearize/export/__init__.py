"""One model for other programs' runtimes: an adapter per format, behind one face."""
