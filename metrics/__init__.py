"""Measures of pictures and codes: arrays in, numbers out; one file a family.

reconstruction  MSE and SSIM of pictures against their reconstructions
codebook        how much of the codebook the codes use
inception       the Inception network of FID, and pictures -> features [N,2048]
frechet         Fréchet distance between two sets of features, whatever the extractor
fid             FID = inception + frechet
"""
