"""Metrics: arrays in, numbers out.

Of the model itself:

reconstruction  MSE and SSIM between images and their reconstructions
codebook        usage and perplexity of the codebook
energy          synaptic operations, energy and firing rates

Of generated against real images, from features:

frechet         Fréchet distance between two sets of features
fid             FID, the paper's FID, KID and Inception score
manifold        precision, recall, density and coverage
memorisation    whether samples are copies of training images
fad             Fréchet autoencoder distance, and its network
classifier      a classifier, its accuracy, and the Fréchet distance between its features
inception       features of the two Inception networks

Used by the modules above:

extraction      runs a network on many images
counts          checks that there are enough images
"""
