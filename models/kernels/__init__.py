"""Native CPU kernels of the spiking layers, and when they are used."""
