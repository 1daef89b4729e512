#!/usr/bin/env bash
# Installs nvcc and CUDA's runtime library into a manylinux_2_28 image, for cibuildwheel.
# 12.8 is the first that knows compute capabilities 10.0 and 12.0.
set -euo pipefail
VERSION=12-8
case "$(uname -m)" in
  x86_64) arch=x86_64 ;;
  aarch64) arch=sbsa ;;
  *) echo "NVIDIA has no packages for $(uname -m)" >&2 && exit 1 ;;
esac
repository="https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$arch/cuda-rhel8.repo"
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "$repository"
dnf install -y "cuda-nvcc-$VERSION" "cuda-cudart-devel-$VERSION"
/usr/local/cuda-12.8/bin/nvcc --version
