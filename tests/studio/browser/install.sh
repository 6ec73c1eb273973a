#!/bin/sh
# What the browser tests need: Playwright's Python client, and the system's Chromium. Nobody is
# asked anything; what cannot be installed here is named by the tests, which then skip.
bin=$1
"$bin/python" -c 'import playwright' 2>/dev/null ||
    "$bin/pip" install --quiet --constraint constraints.txt --editable '.[browser]' ||
    echo "Playwright cannot be installed here" >&2

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ]; then as_root=; else as_root='sudo -n'; fi
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get >/dev/null; then
    # Inter: so that screenshots look alike on every machine.
    { $as_root apt-get update -qq &&
        $as_root apt-get install -y -qq --no-install-recommends chromium fonts-inter fonts-dejavu-core
    } >/dev/null || echo "apt-get cannot install chromium here" >&2
else
    echo "no apt-get to install chromium with" >&2
fi
exit 0
