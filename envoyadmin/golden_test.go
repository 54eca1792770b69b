package envoyadmin

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// render writes a snapshot as text, without what differs from run to run.
func render(s Snapshot) string {
	var b strings.Builder
	slices.SortFunc(s.Listeners, func(x, y Listener) int { return cmp.Compare(x.Name, y.Name) })
	for _, l := range s.Listeners {
		fmt.Fprintf(&b, "listener %q %v %v", l.Name, l.Direction, l.Addresses)
		for _, flag := range []struct {
			set  bool
			name string
		}{{l.Static, "static"}, {l.Ipv4Compat, "ipv4_compat"}, {l.Bound, "bound"}, {l.UDP, "UDP"},
			{l.DNS, "DNS"}, {l.OriginalDst, "original_dst"}, {l.FCDS, "FCDS"},
			{l.LastUpdated.IsZero(), "never updated"}} {
			if flag.set {
				b.WriteString(" " + flag.name)
			}
		}
		b.WriteString("\n")
		for _, c := range l.Chains {
			renderChain(&b, "chain", c)
		}
		if l.DefaultChain != nil {
			renderChain(&b, "default", *l.DefaultChain)
		}
	}
	slices.SortFunc(s.Rejected, func(x, y Rejected) int { return cmp.Compare(x.Name, y.Name) })
	for _, r := range s.Rejected {
		fmt.Fprintf(&b, "rejected %q: %s\n", r.Name, r.Details)
	}
	for _, w := range s.Warming {
		fmt.Fprintf(&b, "warming %q\n", w.Name)
	}
	slices.SortFunc(s.Skipped, func(x, y Skipped) int {
		return cmp.Or(cmp.Compare(x.Listener, y.Listener), cmp.Compare(x.Reason, y.Reason))
	})
	for _, k := range s.Skipped {
		fmt.Fprintf(&b, "skipped %q: %s\n", k.Listener, k.Reason)
	}
	return b.String()
}

func renderChain(b *strings.Builder, kind string, c FilterChain) {
	fmt.Fprintf(b, "  %s %q to %v", kind, c.Name, c.Prefixes)
	if c.Port != 0 {
		fmt.Fprintf(b, " port %d", c.Port)
	}
	rare := c.rare()
	if len(rare.ServerNames) > 0 {
		fmt.Fprintf(b, " server names %v", rare.ServerNames)
	}
	if rare.TransportProtocol != "" {
		fmt.Fprintf(b, " transport %s", rare.TransportProtocol)
	}
	if len(rare.ApplicationProtocols) > 0 {
		fmt.Fprintf(b, " protocols %v", rare.ApplicationProtocols)
	}
	if c.OtherConditions {
		b.WriteString(" other conditions")
	}
	if c.HTTP {
		fmt.Fprintf(b, " HTTP by %q", c.RouteConfig)
	}
	if c.TCP {
		fmt.Fprintf(b, " TCP to %q", c.Cluster)
	}
	if c.TLS {
		b.WriteString(" TLS")
	}
	if c.TLSInspected {
		b.WriteString(" TLS inspected")
	}
	b.WriteString("\n")
}

// golden compares with testdata/NAME.golden.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: want -, got +:\n%s", path, diff)
	}
}

// recorded is an Envoy that gives the answers of testdata/dumps/NAME: info.json, dynamic.json,
// static.json, everything.json.
func recorded(t testing.TB, name string) *Client {
	t.Helper()
	read := func(file string) []byte {
		b, err := os.ReadFile(filepath.Join("testdata", "dumps", name, file))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return b
	}
	files := map[string][]byte{
		"/server_info": read("info.json"), staticPath: read("static.json"), everythingPath: read("everything.json"),
		dynamicPath: read("dynamic.json"), maskedPath: read("masked.json"),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := files[r.URL.RequestURI()]
		if answer == nil {
			t.Errorf("asked for %s", r.URL.RequestURI())
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	}))
	t.Cleanup(server.Close)
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRecorded reads each recorded answer. Those of Envoy 1.40 were written by lab tests, those of
// older ones by hand after the documentation of their API.
func TestRecorded(t *testing.T) {
	dirs, err := os.ReadDir("testdata/dumps")
	if err != nil || len(dirs) == 0 {
		t.Fatal("no recorded answers", err)
	}
	for _, dir := range dirs {
		t.Run(dir.Name(), func(t *testing.T) {
			c := recorded(t, dir.Name())
			s, err := c.Listeners(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			golden(t, dir.Name(), render(s))
			f, err := c.Fingerprint(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if f != s.Fingerprint {
				t.Errorf("the fingerprint is %+v, and of the full dump %+v", f, s.Fingerprint)
			}
		})
	}
}

// TestOneBrokenListener puts each kind of nonsense into one listener: the others are read all the
// same, and it is named.
func TestOneBrokenListener(t *testing.T) {
	good := `{"name":"good","active_state":{"listener":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener","name":"good","address":{"socket_address":{"address":"1.2.3.4","port_value":5}}}}}`
	const bad = `{"name":"bad","active_state":{"listener":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener","name":"bad",%s}}}`
	tests := []struct{ part, reason string }{
		{`"address":7`, "not understood"},
		{`"address":{"socket_address":{"address":"localhost","port_value":5}}`, `"localhost" is no IP address`},
		{`"address":{"socket_address":{"address":"1.2.3.4","port_value":99999}}`, "port"},
		{`"address":{"socket_address":{"address":"1.2.3.4","named_port":"http"}}`, "port"},
		{`"address":{}`, "no address"},
		{`"address":{"envoy_internal_address":{"server_listener_name":"x"}}`, "no socket"},
		{`"api_listener":{}`, "no socket"},
		{`"filter_chains":{}`, "want an array"},
		{`"filter_chains":[5]`, "want an object"},
		{`"filter_chains":[{"name":"c","filters":"x"}]`, `filter chain "c": want an array`},
		{`"filter_chains":[{"name":"c","filter_chain_match":[]}]`, "filter_chain_match"},
		{`"filter_chains":[{"name":"c","filter_chain_match":{"prefix_ranges":[{"address_prefix":"x"}]}}]`, `"x" is no plain`},
		{`"filter_chains":[{"name":"c","filter_chain_match":{"prefix_ranges":[{"address_prefix":"::ffff:1.2.3.4","prefix_len":128}]}}]`, "no plain"},
		{`"filter_chains":[{"name":"c","filter_chain_match":{"destination_port":70000}}]`, "destination port 70000"},
		{`"default_filter_chain":{"filter_chain_match":3}`, "default filter chain"},
		{`"listener_filters":3`, "want an array"},
		{`"name":{"a":[1,2,{"b":3}]}`, "want a string"},
		{`"@type":"type.googleapis.com/google.protobuf.Empty"`, "is no listener"},
		{`"traffic_direction":{}`, "not understood"},
		{`"filter_chain_matcher":[]`, "filter_chain_matcher"},
		{`"filter_chain_matcher":{"matcher_list":{"matchers":[{"predicate":{"not_matcher":{}}}]}}`, "predicate is not understood"},
		{`"filter_chain_matcher":{"on_no_match":{"action":{"name":"x","typed_config":{"@type":"type.googleapis.com/a.B","c":1}}}}`, "no name of a filter chain"},
		{`"filter_chain_matcher":{"on_no_match":{"action":{"name":"x","typed_config":{"@type":"type.googleapis.com/google.protobuf.StringValue","value":"gone"}}}}`, `no filter chain "gone"`},
	}
	for _, test := range tests {
		d := &dump{whole: true}
		if !strings.HasPrefix(test.part, `"address"`) {
			test.part += `,"address":{"socket_address":{"address":"1.2.3.4","port_value":5}}`
		}
		r := newReader(
			strings.NewReader(`{"configs":[` + fmt.Sprintf(bad, test.part) + `,` + good + `]}`))
		if err := r.document(func() error { return r.configs(d.dynamicListener) }); err != nil {
			t.Errorf("%s: %v", test.part, err)
			continue
		}
		if n := len(d.listeners); n == 0 || d.listeners[n-1].Name != "good" {
			t.Errorf("%s: the good one is lost", test.part)
		}
		if !slices.ContainsFunc(d.skipped, func(k Skipped) bool {
			return strings.Contains(k.Reason, test.reason)
		}) {
			t.Errorf("%s: want %q, got %v", test.part, test.reason, d.skipped)
		}
		if slices.ContainsFunc(d.skipped, func(k Skipped) bool {
			return k.Listener == "good" || strings.ContainsRune(k.Reason, '\u00a0')
		}) {
			t.Errorf("%s: got %v", test.part, d.skipped)
		}
	}
	// Very many reasons are counted.
	many := bytes.Repeat([]byte(`5,`), 1000)
	d := &dump{whole: true}
	r := newReader(strings.NewReader(
		`{"configs":[` + fmt.Sprintf(bad, `"filter_chains":[`+string(many)+`6]`) + `]}`))
	if err := r.document(func() error { return r.configs(d.dynamicListener) }); err != nil ||
		len(d.skipped) != maxReasons+1 || d.skipped[maxReasons].Reason != "and 992 more" {
		t.Errorf("%v, %d reasons: %v", err, len(d.skipped), d.skipped)
	}
}

// FuzzDump reads anything as a dump: it ends, keeps within its limits, and says the same of the
// listeners in a full and in a masked reading.
func FuzzDump(f *testing.F) {
	files, err := filepath.Glob("testdata/dumps/*/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal("no seeds", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func(whole, sections bool) (*dump, error) {
			d, statics := &dump{whole: whole}, &dump{whole: whole}
			r := newReader(bytes.NewReader(data))
			err := r.document(func() error {
				return r.configs(func(r *reader) error {
					if sections {
						return d.section(r, statics)
					}
					return d.dynamicListener(r)
				})
			})
			return d, err
		}
		for _, sections := range []bool{false, true} {
			full, errFull := read(true, sections)
			masked, errMasked := read(false, sections)
			if errFull == nil && errMasked == nil && full.fingerprint(1) != masked.fingerprint(
				1) && !sections {
				t.Errorf("full %+v, masked %+v", full.fingerprint(1), masked.fingerprint(1))
			}
			for _, l := range full.listeners {
				if len(l.Addresses) == 0 || len(l.Chains) > maxWays {
					t.Errorf("listener %+v", l)
				}
				for _, c := range l.Chains {
					for _, p := range c.Prefixes {
						if !p.IsValid() || p != p.Masked() {
							t.Errorf("prefix %v", p)
						}
					}
				}
			}
		}
		r := newReader(bytes.NewReader(data))
		r.document(func() error { _, err := r.bootstrap(); return err })
		var h ClusterHealth
		r = newReader(bytes.NewReader(data))
		r.document(func() error { return r.host(&h) })
	})
}
