package chaos

import (
	"bufio"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

func TestAnswer(t *testing.T) {
	var a answer
	err := a.read(bufio.NewReader(strings.NewReader("HTTP/1.1 200 OK\r\nx-served-by: web\r\n\r\n" +
		"name=endpoint local=10.130.0.1:8080 peer=10.128.0.2:4000\n")))
	want := answer{name: "endpoint", served: "web", local: netip.MustParseAddrPort("10.130.0.1:8080"),
		peer: netip.MustParseAddrPort("10.128.0.2:4000")}
	if err != nil || a != want {
		t.Errorf("%+v %v", a, err)
	}
	for _, bad := range []string{"", "HTTP/1.1 503 Service Unavailable\r\n\r\n", "name=a local=b peer=c\n"} {
		err := new(answer).read(bufio.NewReader(strings.NewReader(bad)))
		if !errors.Is(err, errClosed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestCallJudge: which promise a connection breaks, by where it arrived and from where.
func TestCallJudge(t *testing.T) {
	own := netip.MustParseAddrPort("10.128.0.2:4000")
	envoys := netip.MustParseAddrPort("10.128.0.2:5000")
	endpoint := netip.AddrPortFrom(Endpoints()[0].Addr(), 8080)
	for _, c := range []struct {
		name   string
		direct bool
		a      answer
		err    error
		want   Kind
	}{
		{"through Envoy", false, answer{own: own, local: endpoint, peer: envoys}, nil, ""},
		{"through Envoy, from a port of the same number", false,
			answer{own: own, local: endpoint, peer: own}, nil, ""},
		{"passed through by Envoy", false, answer{own: own, local: DB4, peer: envoys}, nil, ""},
		{"escaped", false, answer{own: own, local: DB4, peer: own}, nil, Escaped},
		{"to a stranger's socket", false,
			answer{own: own, local: netip.MustParseAddrPort("127.0.0.1:15001"), peer: own}, nil, Captured},
		{"refused", false, answer{}, io.EOF, Refused},
		{"direct", true, answer{own: own, local: DB4, peer: own}, nil, ""},
		{"trapped", true, answer{own: own, local: endpoint, peer: envoys}, nil, Trapped},
		{"trapped and passed through", true, answer{own: own, local: DB4, peer: envoys}, nil, Trapped},
		{"blocked", true, answer{}, io.EOF, Blocked},
	} {
		if got := (call{to: DB4, direct: c.direct}).judge(c.a, c.err); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestCanaries(t *testing.T) {
	const save = `# Generated
*nat
:OUTPUT ACCEPT [3:180]
:CHAOS_CANARY - [0:0]
:SERVICE_PROXY_OUTPUT - [0:0]
[7:420] -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT
[1:60] -A OUTPUT -d 10.88.0.1/32 -p tcp -m comment --comment canary-jump -j CHAOS_CANARY
[2:120] -A CHAOS_CANARY -p tcp -m comment --comment canary-own
COMMIT
`
	before := parseCanaries(save)
	if len(before) != 3 || before[1].packets != 1 || before[1].bytes != 60 ||
		before[2].table != "nat" {
		t.Fatalf("%+v", before)
	}
	for _, c := range []struct{ name, old, new, want string }{
		{"nothing", "", "", ""},
		{"counted on", "[2:120]", "[3:180]", ""},
		{"another's rule", "[7:420] -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n", "", ""},
		{"written anew", "[2:120]", "[0:0]", "went from [2:120] to [0:0]"},
		{"gone", "[1:60] -A OUTPUT -d", "# ", "is gone"},
		{"the chain is gone", ":CHAOS_CANARY", "# ", "is gone"},
		{"changed", "canary-own", "canary-owned", "is gone"},
		{"twice", "COMMIT", "[0:0] -A OUTPUT -m comment --comment canary-jump\nCOMMIT", "is new"},
	} {
		table, got := changed(before, parseCanaries(strings.ReplaceAll(save, c.old, c.new)))
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) || got != "" && table != "nat" {
			t.Errorf("%s: %q in %q, want %q", c.name, got, table, c.want)
		}
	}
	const other = "*mangle\n[1:60] -A OUTPUT -m comment --comment canary-output\nCOMMIT\n"
	if table, got := changed(parseCanaries(save+other), parseCanaries(other+save)); got != "" {
		t.Errorf("tables in another order: %q in %q", got, table)
	}
	all := canaryRules(IPv4, true)
	if got := readd(before, before, all); got != "" {
		t.Errorf("nothing is missing, and added again is\n%s", got)
	}
	got := readd(before, before[1:2], all)
	if !strings.HasPrefix(got, "*nat\n:CHAOS_CANARY - [0:0]\n-D OUTPUT -d 10.88.0.1/32 ") ||
		!strings.HasSuffix(got, "COMMIT\n") || strings.Count(got, "*") != 1 {
		t.Errorf("added again is\n%s", got)
	}
	nft := parseNFT("table inet chaos_canary {\n\tchain out {\n" +
		"\t\tip daddr 10.88.0.1 tcp dport 9000 counter packets 3 bytes 180 comment \"canary-nft4\"\n\t}\n}\n")
	if len(nft) != 1 || nft[0].packets != 3 || nft[0].bytes != 180 {
		t.Errorf("%+v", nft)
	}
}

func TestProc(t *testing.T) {
	if name, state := statName("42 (a (b) c) Z 1 42"); name != "a (b) c" || state != "Z" {
		t.Errorf("%q %q", name, state)
	}
	if name, state := statName("42 (a"); name != "" || state != "" {
		t.Errorf("%q %q", name, state)
	}
	const said = "Name:\tagent\nVmRSS:\t   2048 kB\nThreads:\t9\n"
	if a, b, c := statusNumber(said, "VmRSS"), statusNumber(said, "Threads"),
		statusNumber(said, "VmHWM"); a != 2048 || b != 9 || c != 0 {
		t.Error(a, b, c)
	}
	if got := firstLines("a\nb\nc\n", 2); got != "a\nb\n" {
		t.Errorf("%q", got)
	}
	if got := lastLines("a\nb\nc", 2); got != "b\nc" {
		t.Errorf("%q", got)
	}
}

func TestQuestionJudge(t *testing.T) {
	for _, c := range []struct {
		want, got netip.Addr
		err       error
		kind      Kind
	}{
		{fromEnvoy, fromEnvoy, nil, ""},
		{fromEnvoy, fromResolver, nil, Escaped},
		{fromEnvoy, netip.Addr{}, io.EOF, Refused},
		{fromResolver, fromResolver, nil, ""},
		{fromResolver, fromEnvoy, nil, Trapped},
		{fromResolver, netip.Addr{}, io.EOF, Blocked},
	} {
		if got := (question{want: c.want}).judge(c.got, c.err); got != c.kind {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestPicture(t *testing.T) {
	const empty = "# Generated\n*nat\n:PREROUTING ACCEPT [3:180]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
	if got := tables(empty); len(got) != 0 {
		t.Errorf("an empty table is %q", got)
	}
	for _, more := range []string{"-A OUTPUT -j ACCEPT", ":OWN - [0:0]", ":INPUT DROP [0:0]"} {
		got := tables(strings.Replace(empty, "COMMIT", more+"\nCOMMIT", 1))
		if len(got) != 1 || strings.Contains(got[0], "#") || strings.Contains(got[0], "[") {
			t.Errorf("with %q: %q", more, got)
		}
	}
	got := sockets(`tcp   LISTEN 0 4096 127.0.0.1:15000 0.0.0.0:* uid:21337 ino:5 sk:1 cgroup:/ <->
tcp   LISTEN 0 4096 *:15020 *:* ino:6 sk:2 cgroup:/ v6only:0 <->
udp   UNCONN 0 0 0.0.0.0:53 0.0.0.0:* uid:4711 ino:7 sk:3
`)
	want := []string{"tcp *:15020 uid:0", "udp 0.0.0.0:53 uid:4711"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := nftTables("table ip nat\ntable inet b\ntable ip6 filter\ntable ip a\n"); !slices.Equal(got,
		[]string{"table inet b", "table ip a"}) {
		t.Errorf("%q", got)
	}
	before := picture{"files": {"a", "b"}, "processes": {"x"}}
	differs := before.differs(picture{"files": {"b", "c"}, "processes": {"x"}})
	if !slices.Equal(differs, []string{"files: c is there", "files: a is gone"}) {
		t.Errorf("%q", differs)
	}
}

func TestSpells(t *testing.T) {
	s, at := spells{}, time.Now()
	if _, ok := s.note("x", false, at); ok {
		t.Error("wrong at once")
	}
	for i := range 3 {
		since, ok := s.note("x", true, at.Add(time.Duration(i)*time.Second))
		if !ok || since != at {
			t.Errorf("%d: since %v, %v", i, since, ok)
		}
	}
	s.note("x", false, at)
	later := at.Add(time.Minute)
	if since, _ := s.note("x", true, later); since != later {
		t.Errorf("after a break since %v", since)
	}
}

// TestJumpsTold: which jumps a status tells of, held against those that are there.
func TestJumpsTold(t *testing.T) {
	const output, inbound = outputJump + "\n", inboundJump + "\n"
	shut := &status.Shape{Jumps: true}
	open := &status.Shape{Jumps: true, Inbound: true, DNS: true}
	for _, c := range []struct {
		name  string
		told  status.Family
		rules string
		lie   bool
	}{
		{"both ways", status.Family{Jumps: true, OutboundPort: 1, InboundPort: 2, Shape: open},
			output + inbound, false},
		{"Envoy listens inbound only", status.Family{Jumps: true, InboundPort: 2, Shape: open}, inbound,
			false},
		{"no jump for serving ports", status.Family{Jumps: true, InboundPort: 2, Shape: open}, output,
			true},
		{"behind another's", status.Family{Jumps: true, OutboundPort: 1, Shape: open},
			"-A OUTPUT -j ACCEPT\n" + output, true},
		{"inbound is held back", status.Family{Jumps: true, OutboundPort: 1, InboundPort: 2, Shape: shut},
			output, false},
		{"an earlier run's are kept", status.Family{Jumps: true, OutboundPort: 1, InboundPort: 2}, output,
			true},
		{"DNS alone", status.Family{Jumps: true, DNSPort: 3, Shape: open}, output + dnsJump, false},
		{"DNS by TCP is not led", status.Family{Jumps: true, DNSPort: 3, Shape: open}, dnsJump, true},
		{"out", status.Family{OutboundPort: 1, Shape: open}, "", false},
	} {
		if got := jumpsTold(c.told).lacks(jumpsOf(strings.Split(c.rules, "\n"))); got != c.lie {
			t.Errorf("%s: a lie: %v, want %v", c.name, got, c.lie)
		}
	}
}

// TestExpected: what differs from the control plane's configuration is told.
func TestExpected(t *testing.T) {
	setting := Setting{DNS: true}
	const save = `*nat
[0:0] -A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND
[0:0] -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT
[0:0] -A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS
[0:0] -A OUTPUT -d 10.88.0.1/32 -p tcp -m comment --comment canary-output
-A SERVICE_PROXY_INBOUND -d 10.128.0.2/32 -p tcp -m tcp --dport 8081 -j SERVICE_PROXY_IN_REDIRECT
[0:0] -A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.1/32 -j SERVICE_PROXY_REDIRECT
[0:0] -A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.2/32 -j SERVICE_PROXY_REDIRECT
[0:0] -A SERVICE_PROXY_SERVICE_CIDRS -d 10.20.0.0/29 -j SERVICE_PROXY_REDIRECT
[0:0] -A SERVICE_PROXY_SERVICE_CIDRS -d 10.20.0.8/31 -j SERVICE_PROXY_REDIRECT
COMMIT
*filter
[0:0] -A OUTPUT -j ACCEPT
COMMIT
`
	want := expect(setting, setting.Base(), IPv4)
	for _, c := range []struct{ name, old, new, want string }{
		{"all is so", "", "", ""},
		{"no jump", "-j SERVICE_PROXY_OUTPUT", "-j ACCEPT", "is there 0 times"},
		{"twice", "[0:0] -A PREROUTING", "[0:0] -A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND\n-A PREROUTING",
			"is there 2 times"},
		{"behind another's", "[0:0] -A PREROUTING", "[0:0] -A PREROUTING -j ACCEPT\n[0:0] -A PREROUTING",
			"first: false"},
		{"a service is missing", "-d 10.10.0.2/32 ", "-d 10.10.0.3/32 ", "no row for 10.10.0.2"},
		{"a service too many", "-d 10.20.0.8/31 ", "-d 10.20.0.8/30 ", "a row for 10.20.0.10"},
		{"far too many", "-d 10.20.0.8/31 ", "-d 10.0.0.0/8 ", "wider than any service"},
		{"all", "COMMIT\n*filter", everyRow + "\nCOMMIT\n*filter", "a row for every address: true"},
		{"not served", "--dport 8081", "--dport 8082", "no row for 10.128.0.2:8081"},
	} {
		err := want.differs(rulesOf(strings.ReplaceAll(save, c.old, c.new), "nat"))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
