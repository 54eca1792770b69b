package rulediff

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var update = flag.Bool("update", false, "write the goldens anew")

func interception(f iptables.Family) iptables.Interception {
	return iptables.Interception{
		Family: f, ProxyUID: 107, ProxyGID: 107, Jumps: true, OutboundPort: 15001,
		Services: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32"),
			netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("fd00::1/128")},
	}
}

// table is what a save of a ruleset shows, after some of it was replaced.
func table(t testing.TB, r iptables.Ruleset, oldnew ...string) iptables.Table {
	t.Helper()
	save := strings.NewReplacer(oldnew...).Replace(r.String())
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(r.String(), oldnew[i]) {
			t.Fatalf("no %q in\n%s", oldnew[i], r)
		}
	}
	have, err := iptables.Parse(r.Family(), []byte(save))
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// differences are the cases that stand as goldens in testdata.
func differences(t *testing.T) map[string]Difference {
	four, six := interception(iptables.IPv4).Ruleset(), interception(iptables.IPv6).Ruleset()
	same4, same6 := Compare(four, table(t, four), nil), Compare(six, table(t, six), nil)
	const jump = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n"
	const row = "-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.1/32 -j SERVICE_PROXY_REDIRECT\n"
	dnat := "-A OUTPUT -d 192.0.2.9/32 -p tcp -m comment --comment \"a \x1b[2J \u202e b\" " +
		"-j DNAT --to-destination 192.0.2.8\n"
	o := Options{Version: "1.2.3", Time: time.Date(2026, 11, 28, 12, 0, 0, 7, time.UTC),
		Against: "what Envoy and the attribute ask for", Backend: iptables.NFT, Services: 2}
	with := func(change func(*Options)) Options {
		o := o
		change(&o)
		return o
	}
	excludes := interception(iptables.IPv4)
	excludes.ExcludePrefixes = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	proxyRow := "-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 107 -m comment --comment proxy-user " +
		"-j RETURN\n"
	settling := interception(iptables.IPv4)
	settling.Jumps = false
	istio := []iptables.Line{{Mark: iptables.Foreign,
		Text: "nft inet firewall nat-out hook output priority -110",
		Note: "comes before iptables' chains"}}
	return map[string]Difference{
		"same": New([]Family{same4, same6}, nil, o),
		"differs": New([]Family{Compare(four, table(t, four, row, "", jump, dnat+jump), nil), same6},
			nil, o),
		"foreign": New([]Family{Compare(four, table(t, four, "COMMIT", ":THEIRS - [0:0]\n"+
			"-A THEIRS -j SERVICE_PROXY_REDIRECT\nCOMMIT"), nil), same6}, istio, o),
		"refused": New([]Family{Compare(four, table(t, four, proxyRow, "", jump, ""), []Left{
			{strings.TrimSpace(proxyRow), "iptables-restore: line 5 failed"}}), same6}, nil, o),
		"comments": New([]Family{Compare(four, table(t, four.WithoutComments()), []Left{
			{iptables.CommentMatch, "no comment match"}}), same6}, nil, o),
		"held": New([]Family{same4, same6}, nil, with(func(o *Options) {
			o.Notes = []string{"IPv4: the jumps are held back: Envoy does not accept on 15001"}
		})),
		"unseen": New([]Family{same4, NotSeen(iptables.IPv6, errors.New("not permitted\nto look"))},
			nil, with(func(o *Options) { o.NeedsRoot = true })),
		"off":  New([]Family{same4, NotUsable(iptables.IPv6, iptables.ErrNoTable)}, nil, o),
		"offs": New([]Family{NotUsable(iptables.IPv4, iptables.ErrNoTable)}, nil, o),
		"nothing": New([]Family{NotSeen(iptables.IPv4, errors.New("x")),
			NotSeen(iptables.IPv6, errors.New("y"))}, nil, with(func(o *Options) { o.Backend = "" })),
		"left": New([]Family{same4, same6}, []iptables.Line{
			{Mark: iptables.Unwanted, Text: "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT",
				Note: "IPv4 in the legacy backend"}}, o),
		"config": New([]Family{Changes(four, excludes.Ruleset()), Changes(six, six)}, nil,
			with(func(o *Options) { o.Config, o.Against = "new.json", "what the attribute asks for now" })),
		"config-same": New([]Family{Changes(four, four), Changes(six, six)}, nil,
			with(func(o *Options) { o.Config, o.Against = "new.json", "what the attribute asks for now" })),
	}
}

// exits are the exit codes and results of these.
var exits = map[string]int{"same": Same, "differs": Differs, "foreign": Same, "refused": Differs,
	"comments": Same, "held": Same, "unseen": NotKnown, "nothing": NotKnown, "off": Same, "offs": NotKnown,
	"left":   Differs,
	"config": Differs, "config-same": Same}

// TestGolden is what people read. The JSON of each is in the form that its schema says.
func TestGolden(t *testing.T) {
	for name, d := range differences(t) {
		t.Run(name, func(t *testing.T) {
			want, known := exits[name]
			word := map[int]string{Same: IsSame, Differs: IsOther, NotKnown: Unknown}[want]
			if !known || d.Exit != want || d.Result != word {
				t.Errorf("exit code %d, %q, want %d", d.Exit, d.Result, want)
			}
			var out, body bytes.Buffer
			if err := errors.Join(d.Text(&out, false, 100), d.JSON(&body)); err != nil {
				t.Fatal(err)
			}
			schema.Valid(t, "diff", body.Bytes())
			terminaltest.Fits(t, d.Text)
			file := filepath.Join("testdata", name+".txt")
			if *update {
				if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(golden), out.String()); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
		})
	}
}

// TestSchema: what is documented is what is written.
func TestSchema(t *testing.T) { schema.Properties(t, "diff", Difference{}) }

// TestSchemaRefuses: it is a schema that something can fail.
func TestSchemaRefuses(t *testing.T) {
	var body bytes.Buffer
	if err := differences(t)["differs"].JSON(&body); err != nil {
		t.Fatal(err)
	}
	for old, changed := range map[string]string{
		`"exit": 1`: `"exit": 3`, `"mark": "-"`: `"mark": "?"`, `"result": "same"`: `"result": ""`,
		`"version"`: `"versions"`, `"text"`: `"texts"`, `"time": "2026`: `"time": "today`,
	} {
		if !strings.Contains(body.String(), old) {
			t.Fatalf("no %s in\n%s", old, body.String())
		}
		other := strings.Replace(body.String(), old, changed, 1)
		if schema.Check(t, "diff", []byte(other)) == nil {
			t.Errorf("takes %s", changed)
		}
	}
}

// TestForeignText: nothing that others wrote moves a terminal, and no line is without end.
func TestForeignText(t *testing.T) {
	for _, evil := range []string{"\x1b[31m", "\r\n", "\u202e", "\u200b", "\x00", "\xff", "\u2028",
		"\a\b\t\v", "<script>", strings.Repeat("x", 1<<20), strings.Repeat("\x1b", 1<<16)} {
		d := New([]Family{{Family: "IPv4", Result: Unknown, Why: evil, Lines: []Line{
			{"+", "-A OUTPUT " + evil, evil}}}}, []iptables.Line{{Mark: '!', Text: evil, Note: evil}},
			Options{Notes: []string{evil}, Config: evil, Against: evil})
		var out, body bytes.Buffer
		if err := errors.Join(d.Text(&out, false, 100), d.JSON(&body)); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			line = strings.TrimSuffix(line, "\n")
			if len(line) > 2*maxLine+100 {
				t.Errorf("a line of %d bytes", len(line))
			}
			if quoted := safe(line); quoted != line && len(line) < maxLine || !utf8.ValidString(line) {
				t.Errorf("printed as is: %q", line)
			}
		}
		if !utf8.Valid(body.Bytes()) || bytes.ContainsAny(body.Bytes(), "\x1b\x00\a\b\v\r<") {
			t.Errorf("JSON: %q", body.String()[:min(body.Len(), 1000)])
		}
	}
	if s := safe("ünïcode – fine \\ \""); s != "ünïcode – fine \\ \"" {
		t.Errorf("changed: %s", s)
	}
}

// TestManyServices: 10,000 services that are absent are told, all of them, in a moment.
func TestManyServices(t *testing.T) {
	i := interception(iptables.IPv4)
	i.Services = nil
	for n := range 10000 {
		i.Services = append(i.Services,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 32))
	}
	want := i.Ruleset()
	have, err := iptables.Parse(iptables.IPv4, []byte("*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	d := New([]Family{Compare(want, have, nil)}, nil, Options{Services: 10000})
	var out bytes.Buffer
	if err := d.Text(&out, false, 100); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second { // some 50 ms
		t.Errorf("took %v", took)
	}
	verdict := fmt.Sprintf("rules differ: %d lines absent (-)\nnext: ", d.Absent)
	if d.Absent != want.Len()+len(want.Chains()) ||
		strings.Count(out.String(), "\n- ") != d.Absent || !strings.Contains(out.String(), verdict) {
		t.Errorf("%d absent of %d rules", d.Absent, want.Len())
	}
}
