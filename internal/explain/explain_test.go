package explain

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var update = flag.Bool("update", false, "write the golden files anew")

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func addrPorts(texts ...string) (all []netip.AddrPort) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddrPort(text))
	}
	return all
}

// asked is what most cases are intercepted by.
func asked(f iptables.Family) iptables.Interception {
	i := iptables.Interception{Family: f, ProxyUID: 999, ProxyGID: 998, Jumps: true,
		OutboundPort: 15001, Services: prefixes("10.0.0.1/32", "10.0.0.2/32", "10.1.0.0/16"),
		ExcludePrefixes: prefixes("10.1.9.0/24"), ExcludePorts: []iptables.PortRange{{First: 3306, Last: 3306}},
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 8080}}}
	if f == iptables.IPv6 {
		i.Services = prefixes("fd10::1/128")
	}
	return i
}

// world is a healthy VM.
func world(q Question) Seen {
	s := Seen{Source: netip.MustParseAddr("10.128.0.5"), Known: true, Asked: asked(q.Family()),
		Mode: "intercepting", Configured: true, ProxyUser: "envoy"}
	s.Listeners = []envoyadmin.Listener{
		{Name: "out", Bound: true, OriginalDst: true,
			Addresses: addrPorts("0.0.0.0:15001", "[::]:15001"), Chains: []envoyadmin.FilterChain{
				{Name: "web", Prefixes: prefixes("10.0.0.1/32", "fd10::1/128"), Port: 80, HTTP: true,
					RouteConfig: "route-web"},
				{Name: "db", Prefixes: prefixes("10.0.0.2/32"), TCP: true, Cluster: "db-a,db-b", TLS: true},
				{Name: "net-a", Prefixes: prefixes("10.1.0.0/16"), TCP: true, Cluster: "net-a",
					Rare: &envoyadmin.RareMatch{ServerNames: []string{"a.test"}}},
				{Name: "net", Prefixes: prefixes("10.1.0.0/16"), TCP: true, Cluster: "net"},
			}},
		{Name: "in", Bound: true, OriginalDst: true, Addresses: addrPorts("0.0.0.0:15006"),
			Chains: []envoyadmin.FilterChain{{Name: "app", Port: 8080, TCP: true, Cluster: "app"}}},
	}
	s.Services = []Service{{"web", netip.MustParsePrefix("10.0.0.1/32"), 80},
		{"db", netip.MustParsePrefix("10.0.0.2/32"), 0}, {"net", netip.MustParsePrefix("10.1.0.0/16"), 0}}
	s.Routes = []envoyadmin.Routes{{Name: "route-web", Count: 2, Hosts: []envoyadmin.VirtualHost{
		{Name: "v", Domains: []string{"web.test", "*.web.test"}, DomainCount: 7,
			Clusters: []string{"web"}, ClusterCount: 1},
		{Name: "rest", Domains: []string{"*"}, DomainCount: 1, ByHeader: true}}}}
	s.Endpoints = []envoyadmin.ClusterEndpoints{
		{ClusterHealth: envoyadmin.ClusterHealth{Name: "web", Total: 12, Healthy: 10, Degraded: 1},
			First: []envoyadmin.Endpoint{{Address: "10.8.0.1:80", Health: "failed active health check"},
				{Address: "10.8.0.2:80", Health: envoyadmin.Healthy}}},
		{ClusterHealth: envoyadmin.ClusterHealth{Name: "db-a"}},
	}
	return s
}

// finish makes the tables, unless the case has.
func finish(s Seen, q Question, edit func(save string) string) Seen {
	s.Want = s.Asked.Ruleset()
	save := s.Want.String()
	if save == "" {
		save = "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
	}
	save = strings.Replace(save, "*nat\n",
		"*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n", 1)
	if edit != nil {
		save = edit(save)
	}
	have, err := iptables.Parse(q.Family(), []byte(save))
	if err != nil {
		panic(err)
	}
	s.Have = have
	steps, _ := q.Path(s)
	if s.CountErr == nil {
		for n := range steps {
			s.Counters = append(s.Counters, iptables.Counter{Packets: uint64(10 - n), Bytes: 600,
				Known: steps[n].Index > 0})
		}
	}
	return s
}

// cases are one of each kind of answer.
func cases() map[string]struct {
	q    Question
	s    Seen
	edit func(string) string
} {
	type kase = struct {
		q    Question
		s    Seen
		edit func(string) string
	}
	all := map[string]kase{}
	add := func(name, to string, edit func(save string) string, change func(*Question, *Seen)) {
		q := Question{To: netip.MustParseAddrPort(to), UID: 65534, GID: 65534}
		probe := q
		s := world(probe)
		if change != nil {
			change(&q, &s)
		}
		all[name] = kase{q, s, edit}
	}
	first := func(chain, rule string) func(string) string {
		return func(save string) string {
			return strings.Replace(save, "-A "+chain+" ", "-A "+chain+" "+rule+"\n-A "+chain+" ", 1)
		}
	}
	without := func(rule string) func(string) string {
		return func(save string) string { return strings.Replace(save, rule+"\n", "", 1) }
	}
	empty := func(string) string { return "*nat\n:PREROUTING ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n" }
	in := func(q *Question, s *Seen) { q.Inbound, s.Local = true, true }

	add("service", "10.0.0.1:80", nil, nil)
	add("service-ipv6", "[fd10::1]:80", nil, func(_ *Question, s *Seen) {
		s.Services = []Service{{"web", netip.MustParsePrefix("fd10::1/128"), 80}}
	})
	add("clusters-of-weights", "10.0.0.2:443", nil, nil)
	add("depends-on-server-name", "10.1.2.3:443", nil, nil)
	add("no-chain-of-that-port", "10.0.0.1:81", nil, nil)
	add("no-chain-intercept-all", "192.0.2.1:443", nil, func(_ *Question, s *Seen) { s.Asked.All = true })
	add("root-intercept-all", "192.0.2.1:443", nil, func(q *Question, s *Seen) {
		s.Asked.All, q.UID, q.GID = true, 0, 0
	})
	add("no-listener-at-port", "10.0.0.1:80", nil, func(_ *Question, s *Seen) { s.Listeners = nil })
	add("not-configured", "10.0.0.3:80", nil, nil)
	add("not-configured-nothing-told", "10.0.0.3:80", nil, func(_ *Question, s *Seen) {
		s.Services, s.Asked.Services = nil, nil
	})
	add("not-configured-yet", "10.0.0.3:80", nil, func(_ *Question, s *Seen) {
		s.Services, s.Asked.Services, s.Configured = nil, nil, false
	})
	add("refused-entry", "10.128.0.9:80", nil, func(_ *Question, s *Seen) {
		s.Refused = []symptom.Refusal{{Listener: "out", Entry: "10.128.0.0/16",
			Reason: "it holds the VM's own address 10.128.0.5"}}
	})
	add("excluded-range", "10.1.9.9:443", nil, nil)
	add("excluded-port", "10.0.0.2:3306", nil, nil)
	add("proxy-user", "10.0.0.1:80", nil, func(q *Question, _ *Seen) { q.UID, q.GID = 999, 998 })
	add("proxy-group", "10.0.0.1:80", nil, func(q *Question, _ *Seen) { q.GID = 998 })
	add("loopback", "127.0.0.1:80", nil, nil)
	add("metadata-server", "169.254.169.254:80", nil, nil)
	add("link-local", "169.254.1.1:80", nil, nil)
	add("foreign-takes", "10.0.0.1:80", first("OUTPUT",
		"-d 10.0.0.1/32 -p tcp -m comment --comment \"docker \x1b[31m<b>\" -j DNAT --to-destination 1.2.3.4"), nil)
	add("foreign-accepts", "10.0.0.1:80", first("OUTPUT", "-p tcp -j ACCEPT"), nil)
	add("foreign-returns", "10.0.0.1:80", first("OUTPUT", "-p tcp -j RETURN"), nil)
	add("foreign-behind", "10.0.0.3:80", func(save string) string {
		return strings.Replace(save, "COMMIT", "-A OUTPUT -j DNAT --to-destination 1.2.3.4\nCOMMIT", 1)
	}, nil)
	add("cannot-tell", "10.0.0.1:80", first("OUTPUT", "-m set --match-set x dst -j ACCEPT"), nil)
	add("row-missing", "10.0.0.1:80", without("-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.1/32 "+
		"-j SERVICE_PROXY_REDIRECT"), nil)
	add("row-too-many", "10.0.0.3:80", first("SERVICE_PROXY_SERVICE_CIDRS",
		"-d 10.0.0.3/32 -j SERVICE_PROXY_REDIRECT"), nil)
	add("counters-changed", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.CountErr = errors.New("chain SERVICE_PROXY_REDIRECT: the rules were changed meanwhile")
	})
	for _, mode := range []string{"hold", "bypass", "off", "paused"} {
		add("mode-"+mode, "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
			s.Mode, s.Asked.Jumps, s.NotReady = mode, false, "Envoy does not accept on port 15001"
		})
	}
	add("jump-missing", "10.0.0.1:80", without("-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"), nil)
	add("rules-missing", "10.0.0.1:80", empty, func(_ *Question, s *Seen) { s.Mode = "" })
	add("rules-missing-off", "10.0.0.1:80", empty, func(_ *Question, s *Seen) {
		s.Mode, s.Asked.Jumps = "off", false
	})
	add("rules-missing-envoy-silent", "10.0.0.1:80", empty, func(_ *Question, s *Seen) {
		s.EnvoyErr, s.Listeners, s.Services, s.Known = errors.New("connection refused"), nil, nil, false
	})
	add("envoy-silent", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.EnvoyErr, s.Listeners, s.Services, s.Known = errors.New("connection refused"), nil, nil, false
	})
	add("envoy-silent-no-service", "10.0.0.3:80", nil, func(_ *Question, s *Seen) {
		s.EnvoyErr, s.Listeners, s.Services, s.Known = errors.New("connection refused"), nil, nil, false
	})
	add("endpoints-unknown", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.Routes, s.Endpoints, s.BehindErr = nil, nil, errors.New("no answer in time")
	})
	add("kernel-unreadable", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.HaveErr = errors.New("not permitted to change iptables: you must be root")
	})
	add("no-route", "[fd10::1]:80", nil, func(_ *Question, s *Seen) {
		s.NoRoute = errors.New("network is unreachable")
	})
	add("ipv6-without-listener", "[fd10::1]:80", nil, func(_ *Question, s *Seen) {
		s.Asked = iptables.Interception{Family: iptables.IPv6, Jumps: true}
	})
	add("nothing-configured", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.Asked = iptables.Interception{Family: iptables.IPv4, Jumps: true}
		s.Listeners, s.Services, s.Configured = nil, nil, false
	})
	add("no-outbound-listener", "10.0.0.1:80", nil, func(_ *Question, s *Seen) {
		s.Asked.OutboundPort = 0
	})
	dns := func(q *Question, s *Seen) {
		q.UDP, s.Asked.DNSPort, s.Asked.ResolverUIDs = true, 15053, []uint32{101}
	}
	add("dns", "8.8.8.8:53", nil, dns)
	add("dns-of-the-resolver", "8.8.8.8:53", nil, func(q *Question, s *Seen) { dns(q, s); q.UID = 101 })
	add("dns-off", "8.8.8.8:53", nil, func(q *Question, _ *Seen) { q.UDP = true })
	add("udp", "8.8.8.8:443", nil, func(q *Question, _ *Seen) { q.UDP = true })
	add("inbound", "10.128.0.5:8080", nil, in)
	add("inbound-not-serving", "10.128.0.5:8081", nil, in)
	add("inbound-no-chain", "10.128.0.5:8080", nil, func(q *Question, s *Seen) {
		in(q, s)
		s.Listeners[1].Chains[0].Port = 9
	})
	add("inbound-routed-through", "10.9.9.9:8080", nil, func(q *Question, s *Seen) {
		q.Inbound, q.In = true, "docker0"
	})
	add("inbound-nothing", "10.128.0.5:8080", nil, func(q *Question, s *Seen) {
		in(q, s)
		s.Asked.InboundPort, s.Asked.Serving = 0, nil
	})
	add("container", "10.0.0.1:80", nil, func(q *Question, s *Seen) {
		q.Inbound, q.In, s.Asked.Interfaces = true, "docker0", []string{"docker0"}
	})
	add("settling", "10.0.0.1:80", nil, func(_ *Question, s *Seen) { s.Asked.Settling = true })
	return all
}

func TestAnswers(t *testing.T) {
	all := cases()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		c := all[name]
		answer := Explain(c.q, finish(c.s, c.q, c.edit))
		var text bytes.Buffer
		if err := answer.WriteText(&text, false, 100); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&text, "\nfinding: %v, complete: %v\n", findingID(answer), answer.Complete())
		terminaltest.Fits(t, answer.WriteText)
		file := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(file, text.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if text.String() != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, text.String(), want)
		}
		checkAnswer(t, name, answer)
	}
}

func findingID(a Answer) symptom.ID {
	if a.Finding == nil {
		return "none"
	}
	return a.Finding.ID
}

// checkAnswer holds what is true of every answer: its shape, and that it can be printed anywhere.
func checkAnswer(t *testing.T, name string, a Answer) {
	t.Helper()
	body, err := json.Marshal(Print(a, "1", 0))
	if err != nil {
		t.Fatal(err)
	}
	schema.Valid(t, "explain", body)
	if bytes.Contains(body, []byte(":null")) {
		t.Errorf("%s: null in %s", name, body)
	}
	if bytes.ContainsAny(body, "<>") {
		t.Errorf("%s: HTML in %s", name, body)
	}
	var text bytes.Buffer
	if err := a.WriteText(&text, false, 100); err != nil {
		t.Fatal(err)
	}
	for _, r := range strings.ReplaceAll(text.String(), "\n", "") {
		if !unicode.IsPrint(r) {
			t.Fatalf("%s: %q is not printable in\n%q", name, r, text.String())
		}
	}
	if text.Len() > 100_000 || len(body) > 300_000 {
		t.Errorf("%s: %d bytes of text, %d of JSON", name, text.Len(), len(body))
	}
	if a.Why == "" {
		t.Errorf("%s: no reason", name)
	}
}

// TestSchema: what is documented is what is written.
func TestSchema(t *testing.T) { schema.Properties(t, "explain", Printed{}) }

// TestForeignText puts the worst that others may write into every field of theirs.
func TestForeignText(t *testing.T) {
	for name, nasty := range map[string]string{
		"control characters": "\x1b]0;x\x07\x9b31m\r\n\t\x00", "HTML": "<script>alert(1)</script>&",
		"not UTF-8": "\xff\xfe\xc3", "a megabyte": strings.Repeat("x\x1b", 1<<19),
		"turned round": "a\u202eb\u2066c", "quotes": "\"'`\\",
	} {
		for kase, c := range cases() {
			s := c.s
			s.Listeners = slices.Clone(s.Listeners)
			for i := range s.Listeners {
				s.Listeners[i].Name = nasty
				s.Listeners[i].Chains = slices.Clone(s.Listeners[i].Chains)
				for j := range s.Listeners[i].Chains {
					chain := &s.Listeners[i].Chains[j]
					chain.Name, chain.RouteConfig, chain.Cluster = nasty, nasty, nasty
					if chain.Rare != nil {
						chain.Rare = &envoyadmin.RareMatch{ServerNames: []string{nasty}}
					}
				}
			}
			for i := range s.Services {
				s.Services[i].Name = nasty
			}
			host := envoyadmin.VirtualHost{Name: nasty, Domains: []string{nasty}, DomainCount: 1,
				Clusters: []string{nasty}, ClusterCount: 1}
			s.Routes = []envoyadmin.Routes{{Name: nasty, Count: 1, Hosts: []envoyadmin.VirtualHost{host}}}
			s.Endpoints = []envoyadmin.ClusterEndpoints{{ClusterHealth: envoyadmin.ClusterHealth{Name: nasty,
				Total: 1}, First: []envoyadmin.Endpoint{{Address: nasty, Health: envoyadmin.Health(nasty)}}}}
			s.Refused = []symptom.Refusal{{Listener: nasty, Entry: "10.0.0.3/32", Reason: nasty}}
			s.NotReady, s.ProxyUser = nasty, nasty
			if s.EnvoyErr != nil {
				s.EnvoyErr = errors.New(nasty)
			}
			if s.HaveErr != nil {
				s.HaveErr = errors.New(nasty)
			}
			s.BehindErr = errors.New(nasty)
			c.q.In = nasty
			checkAnswer(t, name+", "+kase, Explain(c.q, finish(s, c.q, c.edit)))
		}
	}
}

// TestTheVerdictIsTheWalks: for random questions the verdict is that of the walk, and every "no" of
// the rules as they should be has a reason that is not a shrug.
func TestTheVerdictIsTheWalks(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	addresses := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.2.3", "10.1.9.9", "127.0.0.1",
		"169.254.169.254", "192.0.2.1", "10.128.0.5", "fd10::1", "fd10::2", "::1"}
	for range 500 {
		q := Question{To: netip.AddrPortFrom(netip.MustParseAddr(addresses[r.IntN(len(addresses))]),
			[]uint16{53, 80, 81, 3306, 8080}[r.IntN(5)]),
			UID: []uint32{0, 101, 999, 65534}[r.IntN(4)], GID: []uint32{998, 65534}[r.IntN(2)],
			UDP: r.IntN(5) == 0, Inbound: r.IntN(4) == 0, In: []string{"", "docker0"}[r.IntN(2)]}
		s := world(q)
		s.Asked.All, s.Asked.Jumps = r.IntN(4) == 0, r.IntN(8) != 0
		s.Asked.Settling, s.Local = r.IntN(3) == 0, r.IntN(2) == 0
		if !s.Asked.Jumps {
			s.Mode = []string{"hold", "bypass", "off", "paused"}[r.IntN(4)]
		}
		if r.IntN(2) == 0 {
			s.Asked.DNSPort, s.Asked.DNSOverTCP, s.Asked.ResolverUIDs = 15053, true, []uint32{101}
		}
		if r.IntN(2) == 0 {
			s.Asked.Interfaces = []string{"docker0"}
		}
		s = finish(s, q, nil)
		a := Explain(q, s)
		verdict := s.Want.Walk(q.Packet(s))
		want := NotIntercepted
		if verdict.Action == iptables.Redirect {
			want = Intercepted
		}
		if a.Verdict != want || a.Port != verdict.Port || !a.Complete() {
			t.Fatalf("seed %d: %+v: %s at %d, the walk says %+v", seed, q, a.Verdict, a.Port, verdict)
		}
		for _, note := range a.Notes {
			if strings.Contains(note, "not as they should be") {
				t.Fatalf("seed %d: %+v: %s", seed, q, note)
			}
		}
		if a.Why == "" || strings.Contains(a.Why, "its rule is missing") ||
			strings.Contains(a.Why, "are not in the kernel") {
			t.Fatalf("seed %d: %+v: %q", seed, q, a.Why)
		}
		checkAnswer(t, fmt.Sprintf("seed %d", seed), a)
	}
}

func TestParseAddress(t *testing.T) {
	for _, tt := range []struct{ text, want, err string }{
		{"10.0.0.1:80", "10.0.0.1:80", ""},
		{"[fd00::1]:80", "[fd00::1]:80", ""},
		{"[::ffff:10.0.0.1]:80", "10.0.0.1:80", ""},
		{"web.test:80", "", "`getent ahosts web.test`"},
		{"we\x1bb:80", "", "we\uFFFDb"},
		{"10.0.0.1", "", "is not ADDRESS:PORT"},
		{"fd00::1:80:", "", "is not ADDRESS:PORT"},
		{":80", "", "has no address"},
		{"10.0.0.1:0", "", "not a port"},
		{"10.0.0.1:65536", "", "not a port"},
		{"10.0.0.1:http", "", "not a port"},
		{"[fe80::1%eth0]:80", "", "no address that a connection goes to"},
		{"0.0.0.0:80", "", "no address that a connection goes to"},
		{"224.0.0.1:80", "", "no address that a connection goes to"},
	} {
		got, err := ParseAddress(tt.text)
		if tt.err == "" && (err != nil || got.String() != tt.want) ||
			tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%q: %v, %v", tt.text, got, err)
		}
	}
}
