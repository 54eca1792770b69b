//go:build lab

package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// overlapping are filter chains that contend for the same connections.
func overlapping() controlplane.Config {
	tcp := func(name string, port uint16, prefixes ...string) controlplane.Service {
		return controlplane.Service{Name: name, Port: port, Prefixes: controlplane.VIPs(prefixes...),
			Endpoints: endpoints(), Cluster: "all"}
	}
	return controlplane.Config{TLSInspector: true, Services: []controlplane.Service{
		tcp("wide", 0, "10.30.0.0/16"), tcp("net", 0, "10.30.1.0/24"), tcp("one", 81, "10.30.1.1"),
		tcp("two", 0, "10.30.1.2", "10.30.2.0/25"), tcp("port", 82),
		tcp("elsewhere", 83, "10.30.9.0/24"),
		tcp("name", 0, "10.30.3.0/24"), tcp("tls", 0, "10.30.3.0/24"), tcp("raw", 0, "10.30.4.0/24"),
	}, Edit: func(l *listenerv3.Listener) {
		for _, c := range l.FilterChains {
			switch c.Name {
			case "name":
				c.FilterChainMatch.ServerNames = []string{"a.test", "*.b.test"}
			case "tls":
				c.FilterChainMatch.TransportProtocol = "tls"
			case "raw":
				c.FilterChainMatch.TransportProtocol = "raw_buffer"
			}
		}
	}}
}

// TestExplainChain holds the chain that explain names against the one that Envoy's own counters say
// took the connection: by port, prefix, server name, and whether the client speaks TLS.
func TestExplainChain(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: overlapping()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	addresses := []string{"10.30.0.1", "10.30.1.1", "10.30.1.2", "10.30.1.3", "10.30.2.1",
		"10.30.2.200", "10.30.3.1", "10.30.4.1", "10.30.9.1", "192.0.2.9"}
	named := map[string]int{}
	for range soak(200, 15) {
		to := netip.AddrPortFrom(netip.MustParseAddr(addresses[r.IntN(len(addresses))]),
			[]uint16{80, 81, 82, 83}[r.IntN(4)])
		name := []string{"", "", "a.test", "x.b.test", "c.test"}[r.IntN(5)]
		out, stderr, _, err := a.Run(t.Context(), "explain", "-o", "json", "--proxy-user",
			fmt.Sprint(lab.EnvoyUID), "--envoy-log", m.Envoy.LogPath, to.String())
		must(t, err)
		var answer explain.Answer
		if err := json.Unmarshal([]byte(out), &answer); err != nil {
			t.Fatalf("%v: %q %q", err, out, stderr)
		}
		want := "past Envoy"
		if answer.Verdict == explain.Intercepted {
			want = chainFor(answer.Chains, name)
		}
		if got := tookChain(t, m, to, name); got != want {
			t.Fatalf("seed %d: %s, server name %q: Envoy took %q, explain says %q:\n%s", seed, to, name,
				got, want, out)
		}
		named[want]++
	}
	t.Logf("chains that took a connection: %v", named)
	if len(named) < 3 {
		t.Errorf("seed %d: only %v", seed, named)
	}
}

// chainFor is the candidate whose conditions hold for a client that asks for a server name by TLS,
// or does not speak TLS ("").
func chainFor(chains []explain.Chain, name string) string {
	for _, c := range chains {
		holds := true
		for _, when := range c.When {
			switch names, isName := strings.CutPrefix(when, "TLS to the server name "); {
			case isName:
				holds = holds && slices.ContainsFunc(strings.Split(names, ", "), func(n string) bool {
					suffix, wild := strings.CutPrefix(n, "*")
					return n == name || wild && strings.HasSuffix(name, suffix)
				})
			case when == "the client speaks TLS":
				holds = holds && name != ""
			case when == "the client does not speak TLS":
				holds = holds && name == ""
			}
		}
		switch {
		case holds && c.None:
			return "none"
		case holds:
			return c.Name
		}
	}
	return "nothing said"
}

// tookChain makes a connection and finds out by Envoy's counters which chain took it.
func tookChain(t *testing.T, m *mesh.Mesh, to netip.AddrPort, name string) (chain string) {
	t.Helper()
	counters := func() map[string]string {
		out, err := m.Envoy.Admin(t.Context(),
			"/stats?filter=(^tcp\\..*downstream_cx_total|15001.no_filter_chain_match)$")
		must(t, err)
		all := map[string]string{}
		for line := range strings.Lines(out) {
			of, n, _ := strings.Cut(strings.TrimSpace(line), ": ")
			of = strings.TrimSuffix(strings.TrimPrefix(of, "tcp."), ".downstream_cx_total")
			if strings.HasSuffix(of, "no_filter_chain_match") {
				of = "none"
			}
			all[of] = n
		}
		return all
	}
	before := counters()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := m.VM.DialAs(ctx, 1000, to)
	if err != nil {
		return "past Envoy" // where nobody listens
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if name != "" {
		// It ends at an endpoint that does not speak TLS: the first message is what counts.
		config := &tls.Config{ServerName: name, InsecureSkipVerify: true}
		_ = tls.Client(conn, config).HandshakeContext(ctx)
	} else {
		_, _ = io.WriteString(conn, "hello\n")
		_, _ = conn.Read(make([]byte, 1)) // Envoy may close it: that is an answer, too
	}
	chain = "past Envoy"
	deadline := time.Now().Add(2 * time.Second)
	for chain == "past Envoy" && time.Now().Before(deadline) {
		for of, n := range counters() {
			if before[of] != n {
				chain = of
			}
		}
		if !strings.HasPrefix(to.Addr().String(), "10.30.") && to.Port() != 82 {
			break
		}
	}
	return chain
}
