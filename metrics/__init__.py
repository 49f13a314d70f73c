"""Measures of pictures and codes: arrays in, numbers out; one file a family.

reconstruction  MSE and SSIM of pictures against their reconstructions
codebook        how much of the codebook the codes use

Generated against real pictures, from features:

frechet         Fréchet distance between two sets of features, whatever the extractor
fid             FID, the paper's FID, KID and Inception score
manifold        precision, recall, density and coverage
fad             Fréchet autoencoder distance, and its network
classifier      distance, balance and confidence in the eyes of a classifier, and the classifier
inception       the two Inception networks, pictures to features

extraction      a network over many pictures; counts: refusal of too few pictures
"""
