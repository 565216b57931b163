# Sourced by the other scripts or a shell: enters the repository, makes .venv once, installs what is
# asked.
#   install requirements.txt ...
# GATEDFM_PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# tcmalloc, where apt-get has it: glibc hands buffers of tens of megabytes back to the system after
# every step and has them zeroed anew, which costs a training step on CPU a third of its time.
allocator() {
  local folder=.venv/allocator new=.venv/allocator.new package library
  if [ "$(uname -s)" != Linux ] || [ -n "${LD_PRELOAD:-}" ]; then return; fi
  if [ ! -e "$folder" ] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
    rm -rf "$new" && mkdir -p "$new"
    if [ "$(id -u)" = 0 ] && ! ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1; then
      apt-get update -qq || true
    fi
    for package in libtcmalloc-minimal4t64 libtcmalloc-minimal4; do
      if (cd "$new" && apt-get download -qq "$package" && dpkg-deb -x "$package"_*.deb .) \
        >/dev/null 2>&1; then mv "$new" "$folder" && break; fi
    done
  fi
  library=$(find "$PWD/$folder" /usr/lib -name 'libtcmalloc_minimal.so.4' -print -quit 2>/dev/null || true)
  if [ -n "$library" ]; then
    export LD_PRELOAD="$library"
  else
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  fi
}

install() {
  local python="${GATEDFM_PYTHON:-python3}" file stamp sum
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "gatedfm needs Python 3.11 or newer; set GATEDFM_PYTHON to one" >&2
    return 1
  fi
  # Killed midway, `venv` leaves a Python without pip.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$python" -m venv .venv 2>/dev/null; then
      rm -rf .venv
      if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq python3-venv
      fi
      "$python" -m venv .venv || { echo 'install python3-venv, then run this again' >&2; return 1; }
    fi
  fi
  for file in "$@"; do
    # One stamp per file, not per content: pins that go back, as a checkout does, count as others.
    stamp=".venv/installed-$(basename "$file")"
    sum=$(sha256sum <"$file") || return 1
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
      echo "installing $file into .venv"
      .venv/bin/python -m pip install -q --disable-pip-version-check -r "$file" || return 1
      echo "$sum" >"$stamp"
    fi
  done
  allocator
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  export PATH="$PWD/.venv/bin:$PATH"
}
