"""The shared module of the book *Deep Implicit Layers, executable*."""
