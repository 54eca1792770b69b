// Package hostile is what the tests have of those who mean ill: an oracle that says whether a
// hostile control plane (test/controlplane's Hostile makes its configurations) reached the kernel's
// rules or somebody's terminal, and a local user without rights who tries all there is (Harass).
//
// It is written apart from the program: it asks none of its packages what is allowed.
package hostile

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// reserved is never redirected by a row of a service (docs/design/chains.md#what-is-intercepted).
var reserved = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("fd20:ce::254/128"),
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8"),
	netip.MustParsePrefix("0.0.0.0/32"), netip.MustParsePrefix("::/128"),
}

// reservedPorts are SSH's and those of Envoy and the agent.
var reservedPorts = []uint16{22, 15000, 15001, 15006, 15020}

// Rows are those of a save of table nat that no control plane may bring about, with the reason. own
// are the VM's addresses.
func Rows(save string, own []netip.Addr) (bad []string) {
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "-A SERVICE_PROXY_") {
			continue
		}
		if why := row(line, own); why != "" {
			bad = append(bad, why+": "+line)
		}
	}
	return bad
}

func row(line string, own []netip.Addr) string {
	words := strings.Fields(line)
	after := func(flag string) string {
		if i := slices.Index(words, flag); i >= 0 && i+1 < len(words) {
			return words[i+1]
		}
		return ""
	}
	chain, target := words[1], after("-j")
	switch {
	case target == "RETURN", strings.HasPrefix(target, "SERVICE_PROXY_"):
	case target == "REDIRECT" &&
		(strings.HasSuffix(chain, "REDIRECT") || strings.HasSuffix(chain, "DNS")):
	default:
		return "a target that is not ours"
	}
	// Rows that lead on to chains of ours say nothing yet; those below do.
	if target != "SERVICE_PROXY_REDIRECT" {
		return ""
	}
	if slices.Contains(words, "!") {
		return "all but something is redirected"
	}
	if to := after("-d"); to != "" {
		p, err := netip.ParsePrefix(to)
		if err != nil {
			addr, err := netip.ParseAddr(to)
			if err != nil {
				return "what is redirected is no address"
			}
			p = netip.PrefixFrom(addr, addr.BitLen())
		}
		return forbidden(p, own)
	}
	port, err := strconv.ParseUint(after("--dport"), 10, 16)
	if err != nil {
		return "everything is redirected"
	}
	if slices.Contains(reservedPorts, uint16(port)) {
		return "a port that is never redirected"
	}
	return ""
}

func forbidden(p netip.Prefix, own []netip.Addr) string {
	if shortest := map[bool]int{true: 8, false: 16}[p.Addr().Is4()]; p.Bits() < shortest {
		return "too wide"
	}
	for _, r := range reserved {
		if r.Overlaps(p) {
			return "reserved"
		}
	}
	for _, a := range own {
		if p.Contains(a) {
			return "the VM's own address"
		}
	}
	return ""
}

// Most is how long a line of what is told may be, without what its channel puts before it.
const Most = 1024

// Line says what is wrong with a line of text that others have had a part in: it must be one, that
// can be printed on any terminal, and bounded.
func Line(s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("%d bytes, more than %d: %.200q", len(s), most, s)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("not UTF-8: %.200q", s)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%U cannot be printed: %.300q", r, s)
		}
	}
	return nil
}

var (
	serialLine = regexp.MustCompile(
		`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{4}Z service-proxy-agent/1 [A-Z]+: `)
	logLine = regexp.MustCompile(
		`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\t(debug|info|warn|error)\t[^\t]+(\t\{.*\})?$`)
	metricLine = regexp.MustCompile(
		`^(# (HELP|TYPE) [a-z_0-9]+ .*|[a-z_0-9]+(\{([a-z_]+="([^"\\]|\\.)*",?)*\})? [-+0-9.eIinfNa]+)$`)
)

// Told says what is wrong with what the agent has told by now, on all its ways out. It asks a
// running agent.
func Told(m *mesh.Mesh, a *mesh.Agent) (bad []string) {
	note := func(where, line string, most int) {
		if err := Line(line, most); err != nil {
			bad = append(bad, fmt.Sprintf("%s: %v", where, err))
		}
	}
	for _, line := range lines(m.Platform.Serial()) {
		before := serialLine.FindString(line)
		if before == "" {
			bad = append(bad, fmt.Sprintf("serial port: a line that is not the agent's: %.200q", line))
		}
		note("serial port", line[len(before):], Most)
	}
	for key, value := range m.Platform.GuestAttributes("gce-service-proxy") {
		note("guest attribute "+key, value, Most)
	}
	for _, e := range m.Platform.LogEntries() {
		note("Cloud Logging", e.TextPayload, Most)
		for key, value := range e.JSONPayload {
			note("Cloud Logging, "+key, fmt.Sprint(value), Most)
		}
	}
	for _, line := range lines(a.Log()) {
		if !logLine.MatchString(line) {
			bad = append(bad, fmt.Sprintf("log: a line that is not the agent's: %.200q", line))
		}
		// Its fields are parted by tabs, and several of them are of a bounded length.
		note("log", strings.ReplaceAll(line, "\t", " "), 4*Most)
	}
	code, text, err := a.Get("/metrics")
	if err != nil || code != 200 {
		bad = append(bad, fmt.Sprintf("metrics: %d %v", code, err))
	}
	for _, line := range lines(text) {
		if !metricLine.MatchString(line) {
			bad = append(bad, fmt.Sprintf("metrics: a line that is none: %.200q", line))
		}
		note("metrics", line, Most)
	}
	return bad
}

// Shown says what is wrong with what a command shows on a terminal: it may be long, but no line may
// have what a terminal obeys.
func Shown(ctx context.Context, a *mesh.Agent, args ...string) (bad []string) {
	out, stderr, _, err := a.RunAs(ctx, 0, a.Settings(), args...)
	if err != nil {
		return []string{fmt.Sprintf("%v: %v", args, err)}
	}
	for _, line := range lines(out + stderr) {
		if err := Line(strings.ReplaceAll(line, "\t", " "), 16*Most); err != nil {
			bad = append(bad, fmt.Sprintf("%v: %v", args, err))
		}
	}
	return bad
}

// lines are those of a text; a terminal's carriage return at the end of one is its own.
func lines(text string) (all []string) {
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSuffix(line, "\r"); line != "" {
			all = append(all, line)
		}
	}
	return all
}
