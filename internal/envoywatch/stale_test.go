package envoywatch

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// admin is an Envoy's admin interface as far as a Watch asks it. What each answer looks like was
// taken from Envoy 1.40.0: /ready says PRE_INITIALIZING until the first clusters and listeners
// came; the dump of an Envoy that has no listeners is {}; lds.version is 0 until an update was
// taken as a whole; after a hot restart update_success begins with the parent's last.
type admin struct {
	mu       sync.Mutex
	state    string
	uptime   int
	lds      int    // listener_manager.lds.version; -1: no lds_config
	filtered bool   // its stats_matcher leaves lds.* out
	dynamic  string // the VIP of its dynamic listener; "": none
	static   string // the VIP of its static listener
	warming  bool   // a second listener waits for its routes
	requests []string
	asked    func(path string) // called after each answer was made, before it is sent
}

func (a *admin) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

const dumpType = "type.googleapis.com/envoy.admin.v3.ListenersConfigDump"

func listenerJSON(vip string) string {
	return `{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener",
"name":"TRAFFICDIRECTOR_INTERCEPTION_LISTENER",
"address":{"socket_address":{"address":"0.0.0.0","port_value":15001}},"use_original_dst":true,
"filter_chains":[{"filter_chain_match":
{"prefix_ranges":[{"address_prefix":"` + vip + `","prefix_len":32}],"destination_port":80}}]}`
}

func (a *admin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.requests = append(a.requests, r.URL.RequestURI())
	code, body := http.StatusOK, ""
	switch r.URL.Path {
	case "/ready":
		body = a.state + "\n"
		if a.state != "LIVE" {
			code = http.StatusServiceUnavailable
		}
	case "/server_info":
		body = fmt.Sprintf(`{"version":"x/1.40.0/Clean/RELEASE/BoringSSL","state":%q,`+
			`"uptime_current_epoch":"%ds"}`, a.state, a.uptime)
	case "/stats":
		body = "listener_manager.listener_create_failure: 0\n"
		if a.lds >= 0 && !a.filtered {
			body += fmt.Sprintf("listener_manager.lds.update_attempt: 3\n"+
				"listener_manager.lds.update_success: 2\nlistener_manager.lds.version: %d\n", a.lds)
		}
	case "/config_dump":
		switch r.URL.Query().Get("resource") {
		case "static_listeners":
			body = "{}"
			if a.static != "" {
				body = `{"configs":[{"@type":"` + dumpType + `.StaticListener","listener":` +
					listenerJSON(a.static) + `}]}`
			}
		case "":
			body = `{"configs":[` +
				`{"@type":"type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",` +
				`"bootstrap":{"node":{"id":"n"},"dynamic_resources":{}}}]}`
			if a.lds >= 0 {
				body = strings.Replace(body, `"dynamic_resources":{}`,
					`"dynamic_resources":{"lds_config":{"ads":{}}}`, 1)
			}
		default:
			body = `{"configs":[`
			if a.dynamic != "" {
				body += `{"@type":"` + dumpType + `.DynamicListener","name":"a",` +
					`"active_state":{"last_updated":"` + a.dynamic + `",` +
					`"listener":` + listenerJSON(a.dynamic) + `}}`
			}
			if a.warming && a.dynamic != "" {
				body += ","
			}
			if a.warming {
				body += `{"@type":"` + dumpType + `.DynamicListener","name":"w","warming_state":{}}`
			}
			body += `]}`
		}
	default:
		code = http.StatusNotFound
	}
	asked := a.asked
	a.mu.Unlock()
	if asked != nil {
		asked(r.URL.RequestURI())
	}
	w.WriteHeader(code)
	io.WriteString(w, body)
}

// watching is a Watch that asks this admin interface. restart ends its connections, as a new
// process does.
func watching(t *testing.T, a *admin) (w *Watch, restart func()) {
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	client, err := envoyadmin.New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return New(Options{Admin: client}), server.CloseClientConnections
}

// vips are the addresses that the set which counts asks for.
func vips(v View) (all []string) {
	for _, l := range v.Snapshot.Listeners {
		for _, c := range l.Chains {
			for _, p := range c.Prefixes {
				all = append(all, p.Addr().String())
			}
		}
	}
	return all
}

// until looks again and again until the set that counts is want, and fails when an empty one counts
// before.
func until(t *testing.T, w *Watch, want string, allowEmpty bool) {
	t.Helper()
	// On a machine with much to do a question may take 30 ms, and the next of its kind waits 30 s.
	deadline := time.Now().Add(time.Minute)
	for {
		wait := w.Step(t.Context())
		got := fmt.Sprint(vips(w.view()))
		if got == want && w.view().Configured {
			return
		}
		if got == "[]" && w.view().Generation > 0 && !allowEmpty {
			t.Fatalf("an empty set counts (generation %d, configured %v)",
				w.view().Generation, w.view().Configured)
		}
		if time.Now().After(deadline) {
			t.Fatalf("the set that counts is %s, want %s; state %s", got, want, w.view().State)
		}
		time.Sleep(min(wait, 20*time.Millisecond))
	}
}

// TestStaleDump: Envoy was restarted, and its control plane answers just behind a dump that found
// nothing. That dump is older than the configuration, whatever Envoy says of itself afterwards, and
// must not take the services away.
func TestStaleDump(t *testing.T) {
	envoy := &admin{state: "LIVE", uptime: 100, lds: 1, dynamic: "10.10.0.1"}
	w, restart := watching(t, envoy)
	until(t, w, "[10.10.0.1]", true)

	envoy.set(func() {
		envoy.state, envoy.uptime, envoy.lds, envoy.dynamic = "PRE_INITIALIZING", 1, 0, ""
	})
	restart()
	for w.view().State != "PRE_INITIALIZING" { // it is seen, and its empty dump is read
		time.Sleep(min(w.Step(t.Context()), 10*time.Millisecond))
	}
	envoy.set(func() { envoy.state, envoy.lds, envoy.dynamic = "LIVE", 1, "10.10.0.2" })
	w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged})
	until(t, w, "[10.10.0.2]", false)
}

// TestStaleDumpWithin: the control plane answers between the dump and the questions about Envoy's
// state that follow it.
func TestStaleDumpWithin(t *testing.T) {
	envoy := &admin{state: "LIVE", uptime: 100, lds: 1, dynamic: "10.10.0.1"}
	w, restart := watching(t, envoy)
	until(t, w, "[10.10.0.1]", true)

	envoy.set(func() {
		envoy.state, envoy.uptime, envoy.lds, envoy.dynamic = "PRE_INITIALIZING", 1, 0, ""
		dumps := 0
		envoy.asked = func(path string) {
			if path == "/config_dump?resource=dynamic_listeners" {
				if dumps++; dumps == 1 {
					envoy.set(func() {
						envoy.state, envoy.lds, envoy.dynamic = "LIVE", 1, "10.10.0.2"
					})
				}
			}
		}
	})
	restart()
	until(t, w, "[10.10.0.2]", false)
}

// TestStaleDumpOfUnseenRestart: a restart that is not seen as one, since uptimes are of whole
// seconds, must not have the empty set of the new Envoy counted either.
func TestStaleDumpOfUnseenRestart(t *testing.T) {
	envoy := &admin{state: "LIVE", uptime: 100, lds: 1, dynamic: "10.10.0.1"}
	w, _ := watching(t, envoy)
	until(t, w, "[10.10.0.1]", true)
	envoy.set(func() { envoy.state, envoy.lds, envoy.dynamic = "PRE_INITIALIZING", 0, "" })
	for w.view().State != "PRE_INITIALIZING" || w.process.untaken == nil {
		time.Sleep(min(w.Step(t.Context()), 10*time.Millisecond))
		if len(vips(w.view())) == 0 {
			t.Fatal("an empty set counts")
		}
	}
	envoy.set(func() { envoy.state, envoy.lds, envoy.dynamic = "LIVE", 1, "10.10.0.2" })
	until(t, w, "[10.10.0.2]", false)
	envoy.set(func() { envoy.dynamic = "" }) // the control plane takes all away
	until(t, w, "[]", true)
}

// TestEmptySetIsNews: an Envoy that its control plane told that there is nothing has no listeners,
// and that counts.
func TestEmptySetIsNews(t *testing.T) {
	envoy := &admin{state: "LIVE", uptime: 100, lds: 1, dynamic: "10.10.0.1"}
	w, restart := watching(t, envoy)
	until(t, w, "[10.10.0.1]", true)
	envoy.set(func() { envoy.uptime, envoy.dynamic = 1, "" })
	restart()
	until(t, w, "[]", true)
}

// TestStaticListeners: an Envoy without an lds_config is configured once it is live, and its static
// listeners count. One that has an lds_config and was told nothing is not, static listeners or not.
func TestStaticListeners(t *testing.T) {
	envoy := &admin{state: "LIVE", uptime: 100, lds: -1, static: "10.10.0.7"}
	w, _ := watching(t, envoy)
	until(t, w, "[10.10.0.7]", true)

	for _, waiting := range []*admin{
		{state: "LIVE", uptime: 100, lds: 0, static: "10.10.0.7"},
		{state: "LIVE", uptime: 100, lds: 0, static: "10.10.0.7", filtered: true},
	} {
		staysUnconfigured(t, waiting)
	}
}

func staysUnconfigured(t *testing.T, waiting *admin) {
	w, _ := watching(t, waiting)
	for asked := 0; asked < 3; asked++ { // after the dump, and in two looks more
		w.Step(t.Context())
	}
	stats := func(uri string) bool { return strings.HasPrefix(uri, "/stats") }
	if !slices.ContainsFunc(waiting.requests, stats) {
		t.Errorf("not asked for its statistics: %q", waiting.requests)
	}
	if w.view().Configured || w.view().Generation != 0 {
		t.Errorf("an Envoy that was told nothing counts as configured: %+v", w.view())
	}
}
