#!/usr/bin/env bash
# SimpleITK, itk: a file with an alpha channel read as float or 32 bits is 255 times as bright.
#
# Versions: SimpleITK 2.5.7, itk-io 5.4.7, Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6.
# Expected: ReadImage(path, sitkFloat32) gives the gray values of a color picture, 0 to 255, with
# or without an alpha channel (which is 255 everywhere in screenshots and most exports).
# Behavior: gray is the luminance times alpha; alpha is divided by 255 only if the type asked for
# has 8 or 16 bits. In float32, float64 and int32 values go up to 65025. ITK's source says that
# the fault was kept for compatibility; no documentation says it. RGB pictures are right, so in a
# folder of both kinds some are 255 times as bright, and a window, a threshold or a mean square
# against the others is nonsense without a message. The same happens to 8-bit TIFFs in tiles, as
# pathology and GDAL write them, though they have no alpha: ITK reads these through RGBA. Labels 1
# and 2 are then 255 and 510.
# Workaround: sitk.Cast(sitk.ReadImage(path, sitk.sitkUInt8), sitk.sitkFloat32).
#
# Output seen (mean of the same picture):
#                        uint8     int16     int32   float32   float64
