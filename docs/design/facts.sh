# What the examples of facts.md need. It begins a shell in namespaces of its own, as root:
#
#   unshare --net --mount --pid --fork --kill-child --mount-proc bash --rcfile docs/design/facts.sh
#
# So the machine's network, rules, locks and /dev/shm are not touched, and all ends with the shell.
# ENVOY is the Envoy to try, $PWD/build/envoy-1.40.0 if it is not set.
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm
export ENVOY=${ENVOY:-$PWD/build/envoy-1.40.0}
ip link set lo up
ip address add 10.0.0.7/32 dev lo # the service's address

# until_ok COMMAND…: waits until it succeeds, thirty seconds at most.
until_ok() {
  local end=$((SECONDS + 30))
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.02; done
}

# serve PORT WORD: a server that answers each line with the word.
serve() {
  python3 -c '
import socketserver, sys
class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile: self.wfile.write(sys.argv[2].encode() + b"\n")
class Server(socketserver.ThreadingTCPServer): daemon_threads = True
Server(("", int(sys.argv[1])), Answer).serve_forever()' "$1" "$2" 2>/dev/null &
  until_ok listens "$1"
}
listens() { ss -Hltn "sport = :$1" | grep -q .; }

# ask FD: sends a line on an open stream and prints the answer.
ask() { if echo >&"$1" && read -rt 3 -u "$1"; then echo "$REPLY"; else echo "no answer"; fi; } 2>/dev/null

# try ADDRESS PORT: the same on a connection of its own.
try() { if exec 9<>"/dev/tcp/$1/$2"; then ask 9; else echo "no connection"; fi; } 2>/dev/null

# envoy [FLAG…]: starts one that takes its listeners from a file, and waits until it is live.
envoy() {
  local service='{"endpoint": {"address": {"socket_address": {"address": "10.0.0.7", "port_value": 80}}}}'
  cat >/run/envoy.json <<END
{"node": {"id": "node", "cluster": "cluster"},
 "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
 "dynamic_resources": {"lds_config": {"path_config_source": {"path": "/run/lds/lds.json"}}},
 "static_resources": {"clusters": [{"name": "web", "type": "STATIC", "load_assignment":
   {"cluster_name": "web", "endpoints": [{"lb_endpoints": [$service]}]}}]}}
END
  "$ENVOY" -c /run/envoy.json --concurrency 1 -l info "$@" 2>>/run/envoy.log >&2 &
  until_ok live
}
live() { [[ $(admin ready) == LIVE ]]; }
dumped() { admin 'config_dump?resource=dynamic_listeners' | grep -q "\"$1\""; }
logged() { grep -q "$1" /run/envoy.log; }
initializing() { [[ $(admin ready) == *INITIALIZING ]]; }
admin() { curl -s "127.0.0.1:15000/$1" "${@:2}"; }

# listener ADDRESS…: has the file hold one listener with a filter chain for each address.
listener() {
  local address chains=() type=type.googleapis.com/envoy
  for address; do
    chains+=("{\"filter_chain_match\": {\"prefix_ranges\":
      [{\"address_prefix\": \"$address\", \"prefix_len\": 32}]}, \"filters\": [{\"name\": \"tcp\",
      \"typed_config\": {\"@type\": \"$type.extensions.filters.network.tcp_proxy.v3.TcpProxy\",
      \"stat_prefix\": \"web\", \"cluster\": \"web\"}}]}")
  done
  mkdir -p /run/lds
  cat >/run/lds/new <<END
{"version_info": "$((++version))", "resources": [{"@type": "$type.config.listener.v3.Listener",
  "name": "web", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15001}},
  "listener_filters": [{"name": "original_dst", "typed_config":
    {"@type": "$type.extensions.filters.listener.original_dst.v3.OriginalDst"}}],
  "filter_chains": [$(IFS=,; echo "${chains[*]}")]}]}
END
  mv /run/lds/new /run/lds/lds.json # Envoy looks when a file is moved there
}

# stream TARGET: starts an Envoy that asks a control plane by google_grpc, and waits for its admin.
stream() {
  cat >/run/ads.json <<END
{"node": {"id": "node", "cluster": "cluster"},
 "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
 "dynamic_resources": {"lds_config": {"resource_api_version": "V3", "ads": {}},
  "ads_config": {"api_type": "GRPC", "transport_api_version": "V3",
   "grpc_services": [{"google_grpc": {"target_uri": "$1", "stat_prefix": "xds"}}]}}}
END
  "$ENVOY" -c /run/ads.json --concurrency 1 -l info "${@:2}" 2>>/run/envoy.log >&2 &
  until_ok admin ready
}
