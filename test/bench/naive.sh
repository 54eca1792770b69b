#!/bin/sh
# usage: naive.sh UID-OF-ENVOY
# The loop that one writes before there is an agent, and which `make bench` holds the agent against
# (test/curve): once a second, each address of Envoy's listeners gets its redirect. It is no straw
# man: what differs is written in one transaction, and an Envoy that does not answer is no news.
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"; exit 0' TERM INT
iptables-restore --noflush -w 5 <<END || exit 1
*nat
:NAIVE - [0:0]
-I OUTPUT -p tcp -m owner ! --uid-owner $1 -j NAIVE
COMMIT
END
pass() {
  curl -sf 'http://127.0.0.1:15000/config_dump?resource=dynamic_listeners' >dump || return
  jq -r '.configs[]?.active_state.listener.filter_chains[]?.filter_chain_match.prefix_ranges[]? |
    "\(.address_prefix)/\(.prefix_len)"' dump | sort -u >want
  iptables -w 5 -t nat -S NAIVE | sed -n 's/^-A NAIVE -d \([^ ]*\) .*/\1/p' | sort >have
  cmp -s have want || { echo '*nat'; comm -3 have want |
    sed 's/^[^\t].*/-D NAIVE -d & -p tcp -j REDIRECT --to-ports 15001/
         s/^\t\(.*\)/-A NAIVE -d \1 -p tcp -j REDIRECT --to-ports 15001/'
    echo COMMIT; } | iptables-restore --noflush -w 5
}
while :; do pass; sleep 1; done
