#!/usr/bin/env bash
# What the tests use beyond Python: a browser for the apps, the stamps as photographs, WordNet for the query list, PostgreSQL as the study's other
# database. Debian as root installs them; elsewhere the tests that need them skip and say so.
set -eu
missing=()
[ -x /usr/bin/chromium ] || missing+=(chromium)
[ -d /usr/share/tuxpaint/stamps ] || missing+=(tuxpaint-stamps-default)
[ -d /usr/share/wordnet ] || missing+=(wordnet-base)
ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing+=(postgresql)
[ ${#missing[@]} -eq 0 ] && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "not installed: ${missing[*]}; the tests that need them will be skipped" >&2
fi
