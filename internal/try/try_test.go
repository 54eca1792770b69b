package try

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// led is the outcome of a connection to 10.0.0.1:80.
func led(led Led, where string) Outcome {
	o := Outcome{Ask: Ask{To: netip.MustParseAddrPort("10.0.0.1:80")}, Answer: Connected, Led: led}
	if where != "" {
		o.Where = netip.MustParseAddrPort(where)
		o.local = led == Here || o.Where.Addr().IsLoopback()
	}
	return o
}

func TestCompare(t *testing.T) {
	redirect := iptables.Verdict{Action: iptables.Redirect, Port: 15001,
		Chain: "SERVICE_PROXY_REDIRECT", Rule: "-p tcp -j REDIRECT --to-ports 15001"}
	taken := func(rule string) iptables.Verdict {
		return iptables.Verdict{Action: iptables.Taken, Chain: "OUTPUT", Rule: rule}
	}
	pass := iptables.Verdict{Action: iptables.Pass}
	cannotTell := iptables.Verdict{Action: iptables.CannotTell, Chain: "OUTPUT", Rule: "-m x -j ACCEPT"}
	unseen := led(Unseen, "")
	toLoopback := led(Itself, "127.0.0.1:15001")
	toLoopback.Ask.To = toLoopback.Where
	const dnat = "-p tcp -j DNAT --to-destination "
	for _, test := range []struct {
		name    string
		verdict iptables.Verdict
		outcome Outcome
		want    Agreement
	}{
		{"redirected", redirect, led(Here, "127.0.0.1:15001"), Agree},
		{"redirected in PREROUTING", redirect, led(Here, "192.0.2.9:15001"), Agree},
		{"redirected to where it goes anyway", redirect, toLoopback, Agree},
		{"redirected to another port", redirect, led(Here, "127.0.0.1:15006"), Differ},
		{"not redirected", redirect, led(Itself, "10.0.0.1:80"), Differ},
		{"not redirected, without entry", redirect, led(Itself, ""), Differ},
		{"that port of another machine", redirect, led(Elsewhere, "10.9.9.9:15001"), Differ},
		{"redirected, not seen", redirect, unseen, OnlyRules},
		{"passed", pass, led(Itself, "10.0.0.1:80"), Agree},
		{"passed, without entry", pass, led(Itself, ""), Agree},
		{"passed but redirected", pass, led(Here, "127.0.0.1:15001"), Differ},
		{"passed but taken", pass, led(Elsewhere, "10.9.9.9:80"), Differ},
		{"passed, not seen", pass, unseen, OnlyRules},
		{"cannot tell", cannotTell, led(Here, "127.0.0.1:15001"), OnlyTried},
		{"nobody can tell", cannotTell, unseen, OnlyRules},
		{"another's DNAT", taken(dnat + "10.9.9.9"), led(Elsewhere, "10.9.9.9:80"), Agree},
		{"another's DNAT with port", taken(dnat + "10.9.9.9:81"), led(Elsewhere, "10.9.9.9:81"), Agree},
		{"another's DNAT, of IPv6", taken(dnat + "[fd00::1]:81"), led(Elsewhere, "[fd00::1]:81"), Agree},
		{"another's DNAT to itself", taken(dnat + "10.0.0.1"), led(Itself, "10.0.0.1:80"), Agree},
		{"another's DNAT to a range", taken(dnat + "10.9.9.9-10.9.9.12"), led(Elsewhere, "10.9.9.10:80"), Agree},
		{"another's DNAT that did not take it", taken(dnat + "10.9.9.9"), led(Itself, "10.0.0.1:80"), Differ},
		{"another's DNAT that came to Envoy", taken(dnat + "10.9.9.9"), led(Here, "127.0.0.1:15001"), Differ},
		{"another's redirect", taken("-j REDIRECT --to-ports 9"), led(Here, "127.0.0.1:9"), Agree},
		{"another's redirect of the address", taken("-j REDIRECT"), led(Here, "127.0.0.1:80"), Agree},
		{"another's redirect that came to Envoy", taken("-j REDIRECT --to-ports 9"), led(Here, "127.0.0.1:15001"), Differ},
		{"another's redirect to itself", taken("-j REDIRECT"), toLoopback, Agree},
		{"another's redirect that did not take it", taken("-j REDIRECT"), led(Itself, "10.0.0.1:80"), Differ},
		{"another's target", taken("-j NETMAP --to 10.9.0.0/16"), led(Elsewhere, "10.9.0.1:80"), Agree},
		{"no verdict", iptables.Verdict{}, led(Itself, "10.0.0.1:80"), Differ},
	} {
		c := Compare(test.verdict, test.outcome)
		if c.Agreement != test.want || c.Rules == "" || c.Tried == "" {
			t.Errorf("%s: %+v, want %v", test.name, c, test.want)
		}
	}
}

func TestComparisonSaysBoth(t *testing.T) {
	o := led(Here, "127.0.0.1:15006")
	o.Answer, o.State = Refused, "SYN_SENT"
	c := Compare(iptables.Verdict{Action: iptables.Redirect, Port: 15001, Chain: "C", Rule: "-j R"}, o)
	want := Comparison{Differ, "the rules redirect it to port 15001 by -A C -j R",
		"the kernel redirected it to port 15006 of this machine; refused (conntrack: SYN_SENT)"}
	if c != want {
		t.Errorf("got %+v\nwant %+v", c, want)
	}
}

func TestFromEntry(t *testing.T) {
	const dstNAT = 1 << 5
	entry := func(status uint32, reply string) conntrack.Entry {
		return conntrack.Entry{Dst: netip.MustParseAddrPort("10.0.0.1:80"), Status: status,
			ReplySrc: netip.MustParseAddrPort(reply), TCPState: 3}
	}
	for _, test := range []struct {
		name  string
		entry conntrack.Entry
		local bool
		led   Led
		port  uint16
	}{
		{"as asked for", entry(0, "10.0.0.1:80"), false, Itself, 0},
		{"as asked for, here", entry(0, "10.0.0.1:80"), true, Itself, 0},
		{"changed to what it was", entry(dstNAT, "10.0.0.1:80"), true, Itself, 0},
		{"redirected", entry(dstNAT, "127.0.0.1:15001"), true, Here, 15001},
		{"led away", entry(dstNAT, "10.9.9.9:15001"), false, Elsewhere, 0},
	} {
		var o Outcome
		o.fromEntry(test.entry, test.local)
		if o.Led != test.led || o.Port() != test.port || o.State != "ESTABLISHED" ||
			o.Where != test.entry.ReplySrc {
			t.Errorf("%s: %+v", test.name, o)
		}
	}
}

func TestAnswerOf(t *testing.T) {
	for _, test := range []struct {
		err  error
		want Answer
	}{
		{nil, Connected}, {unix.ECONNRESET, Reset}, {unix.ECONNREFUSED, Refused}, {errLimit, Silent},
		{context.DeadlineExceeded, Silent}, {unix.ETIMEDOUT, Silent}, {unix.EHOSTUNREACH, Unreachable},
		{unix.ENETUNREACH, Unreachable}, {unix.EADDRNOTAVAIL, Failed}, {context.Canceled, 0},
	} {
		if got := answerOf(test.err); got != test.want {
			t.Errorf("%v: got %v, want %v", test.err, got, test.want)
		}
		if test.err != nil {
			if got := answerOf(fmt.Errorf("connect: %w", test.err)); got != test.want {
				t.Errorf("%v wrapped: got %v, want %v", test.err, got, test.want)
			}
		}
	}
}

func TestNoTarget(t *testing.T) {
	for _, to := range []string{"0.0.0.0:80", "[::]:80", "10.0.0.1:0", "224.0.0.1:80", "[ff02::1]:80"} {
		ask := Ask{To: netip.MustParseAddrPort(to)}
		if _, err := Connect(t.Context(), ask); !errors.Is(err, ErrNoTarget) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if _, err := Connect(t.Context(), Ask{}); !errors.Is(err, ErrNoTarget) {
		t.Errorf("nothing: %v", err)
	}
}

func TestWords(t *testing.T) {
	for a := Connected; a <= Failed; a++ {
		if a.String() == "" || strings.Contains(a.String(), "(") {
			t.Errorf("answer %d: %q", a, a)
		}
	}
	for a := Agree; a <= OnlyRules; a++ {
		if a.String() == "" || strings.Contains(a.String(), "(") {
			t.Errorf("agreement %d: %q", a, a)
		}
	}
	for _, o := range []Outcome{led(Itself, ""), led(Elsewhere, "10.9.9.9:80"), led(Unseen, "")} {
		o.Answer, o.Err = Failed, unix.EADDRNOTAVAIL
		if !strings.HasSuffix(o.String(), "failed: cannot assign requested address") {
			t.Errorf("%q", o)
		}
	}
}
