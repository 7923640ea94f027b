#!/bin/sh
# Makes .venv with the first Python of the PATH (or $PYTHON alone) that is new enough and whose venv
# works. Both are found out by running it: a pyenv shim exists for versions that are not selected and
# fails, and Debian's python3 comes without ensurepip. Else: one line that mends it, and exit 1.
set -u
cd "$(dirname "$0")/.." || exit 1

# 3.14 is the newest that the pinned wheels exist for.
suitable='import sys
sys.exit(not ((3, 12) <= sys.version_info[:2] <= (3, 14) and sys.implementation.name == "cpython" and sys.maxsize > 2**32))'
number='import sys; print("%d.%d" % sys.version_info[:2])'
has() { command -v "$1" >/dev/null 2>&1; }
trap 'rm -rf .venv; exit 130' INT TERM

tried= old= no_venv= apt= built=
for python in ${PYTHON:-python3.12 python3.13 python3.14 python3 python}; do
    [ -z "${PYTHON:-}" ] || python=$PYTHON # whole, though its path may have spaces
    if ! version=$("$python" -c "$number" 2>/dev/null); then
        has "$python" && tried="$tried, $python does not run"
    elif ! "$python" -c "$suitable" 2>/dev/null; then
        tried="$tried, $python is $version" old=$python
    # --clear: what is there has no working interpreter, or make would not have come here.
    elif "$python" -m venv --clear .venv >/dev/null 2>&1; then
        echo "Made .venv with $("$python" --version)"
        exit 0
    else
        rm -rf .venv
        tried="$tried, the venv module of $python fails"
        case $(command -v "$python") in /usr/bin/*) no_venv=$version ;; esac # the distribution's own
    fi
    [ -z "${PYTHON:-}" ] || break
done

sudo=
[ "$(id -u)" = 0 ] || sudo="sudo "
goals=${GOALS:+ $GOALS}
pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}
for v in 3.12 3.13 3.14; do # what Debian or Ubuntu offer
    [ -n "$apt" ] || ! has apt-cache || ! apt-cache policy "python$v" 2>/dev/null | grep -q "Candidate: 3" || apt=$v
done
for path in "$pyenv"/versions/3.12.*/bin/python "$pyenv"/versions/3.1[34].*/bin/python; do
    [ -n "$built" ] || ! "$path" -c "$suitable" 2>/dev/null || built=$path
done

if [ -n "$no_venv" ] && has apt-get; then
    mend="${sudo}apt-get install python$no_venv-venv"
elif [ -n "$built" ]; then
    mend="make PYTHON=\"$built\"$goals"
elif has uv; then
    mend="uv venv --seed --python 3.12 .venv"
elif has pyenv; then
    mend="pyenv install 3.12"
elif [ -n "$apt" ]; then
    mend="${sudo}apt-get install python$apt python$apt-venv"
elif has brew; then
    mend="brew install python@3.12"
elif has conda; then
    mend="conda create -y -p .conda python=3.12 && make PYTHON=.conda/bin/python$goals"
elif has dnf; then
    mend="${sudo}dnf install python3.12"
elif [ -n "$old" ] && "$old" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    # An old Python can at least bring uv, and uv brings a new one.
    mend="$old -m venv .uv && .uv/bin/pip install uv && .uv/bin/uv venv --seed --python 3.12 .venv"
else
    mend="install Python 3.12 from https://www.python.org/downloads/, then: make PYTHON=/where/it/is/python3.12$goals"
fi
[ -n "$tried" ] || tried=", none ${PYTHON:+called $PYTHON }found"
echo "s2jax needs Python 3.12 to 3.14 with a working venv (${tried#, }). This mends it:  $mend" >&2
exit 1
