package attribute

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// The captures in testdata were written by real gcloud.
func TestParseCaptures(t *testing.T) {
	def := func(change func(*Config)) Config {
		cfg := Default()
		change(&cfg)
		return cfg
	}
	excludes := []netip.Prefix{netip.MustParsePrefix("8.8.8.8/32"),
		netip.MustParsePrefix("129.168.10.0/24")}
	want := map[string]Config{
		"agent-location": def(func(c *Config) { c.ServingPorts = []uint16{80, 8080}; c.Network = "default" }),
		"docs-example":   def(func(c *Config) { c.Labels = map[string]string{"app": "review", "version": "canary"} }),
		"everything": def(func(c *Config) {
			c.ServingPorts = []uint16{80, 8080}
			c.InterceptAllOutbound, c.InterceptDNS, c.Tracing = true, true, true
			c.ExcludeOutboundIPRanges = excludes
			c.ExcludeOutboundPortRanges = []PortRange{{81, 81}, {8080, 8090}}
			c.Labels = map[string]string{"app": "review", "version": "canary"}
			c.AccessLog = "/var/log/envoy/access.log"
			c.Network, c.Mesh, c.ProjectNumber = "default", "sidecar-mesh", "123456789012"
			c.PrimarySource, c.SecondarySource = "gs://my-bucket/envoy.tgz", "gs://my-bucket/envoy.tgz"
		}),
		"intercept-all-exclude-reversed-ports": def(func(c *Config) {
			c.InterceptAllOutbound = true
			c.ExcludeOutboundPortRanges = []PortRange{{8000, 9000}}
			c.Network = "default"
		}),
		"intercept-all-excludes": def(func(c *Config) {
			c.ServingPorts = []uint16{80, 8080}
			c.InterceptAllOutbound = true
			c.ExcludeOutboundIPRanges = excludes
			c.ExcludeOutboundPortRanges = []PortRange{{81, 81}, {8080, 8090}}
			c.Network = "default"
		}),
		"intercept-dns": def(func(c *Config) { c.ServingPorts = []uint16{80}; c.InterceptDNS = true; c.Network = "default" }),
		"labels-odd": def(func(c *Config) {
			c.Labels = map[string]string{"app": `a,b "q" \ x`, "unicode": "é中", "empty": ""}
			c.Network = "default"
		}),
	}
	files, err := filepath.Glob("testdata/*.attr")
	if err != nil || len(files) != len(want)+1 {
		t.Fatalf("found %d captures, want %d: %v", len(files), len(want)+1, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".attr")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		have, err := Parse(text)
		if name == "asm-managed" {
			if !errors.Is(err, ErrAnthos) {
				t.Errorf("%s: have %v, want ErrAnthos", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want[name], have, cmpopts.EquateEmpty(),
			cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +have):\n%s", name, diff)
		}
	}
}

// Every key with every type of JSON value that is not its own: each is refused with that key's
// path, what is wanted and what is there.
func TestParseWrongTypes(t *testing.T) {
	values := map[string]string{ // what it is called -> one
		"null": "null", "true or false": "true", "a number": "8080", "a string": `"x"`, "a list": `[{}]`, "an object": `{"x": {}}`,
	}
	keys := map[string]string{ // path -> type
		"api-version": "a string", "service": "an object", "traffic-interception": "an object", "labels": "an object",
		"proxy-spec": "an object", "service.serving-ports": "a list",
		"traffic-interception.intercept-all-outbound":       "true or false",
		"traffic-interception.exclude-outbound-ip-ranges":   "a list",
		"traffic-interception.exclude-outbound-port-ranges": "a list",
		"traffic-interception.intercept-dns":                "true or false",
		"proxy-spec.proxy-port":                             "a whole number", "proxy-spec.tracing": "a string",
		"proxy-spec.access-log": "a string", "proxy-spec.network": "a string", "proxy-spec.scope": "a string",
		"proxy-spec.mesh": "a string", "proxy-spec.project-number": "a string", "proxy-spec.primary-source": "a string",
		"proxy-spec.secondary-source": "a string", "proxy-spec.xds-version": "a whole number",
	}
	for key, typ := range keys {
		for name, value := range values {
			if name == typ || name == "a number" && typ == "a whole number" {
				continue
			}
			doc := fmt.Sprintf(`{"api-version": "0.2", "labels": {}, %s}`, nest(key, value))
			if key == "labels" || key == "api-version" {
				doc = fmt.Sprintf(`{%q: %s}`, key, value)
			}
			_, err := Parse([]byte(doc))
			want := fmt.Sprintf("attribute gce-service-proxy: key %s: want %s, have %s", key, typ, name)
			if err == nil || err.Error() != want {
				t.Errorf("have %v\nwant %s", err, want)
			}
		}
	}
	for _, key := range []string{
		"service.serving-ports", "traffic-interception.exclude-outbound-ip-ranges", "traffic-interception.exclude-outbound-port-ranges"} {
		for name, value := range values {
			_, err := Parse([]byte("{" + nest(key, "["+value+"]") + "}"))
			typ := "a string"
			if key == "service.serving-ports" {
				typ = "a whole number"
			}
			switch {
			case name == "a number" && typ == "a whole number":
				if err != nil {
					t.Error(err)
				}
				continue
			case name == "a string" && typ == name:
				name = `"x"` // no address and no port
				typ = map[bool]string{true: "an IP address or CIDR range",
					false: "a port or FIRST-LAST from 1 to 65535"}[strings.Contains(key, "-ip-")]
			}
			want := fmt.Sprintf("attribute gce-service-proxy: key %s[0]: want %s, have %s", key, typ, name)
			if err == nil || err.Error() != want {
				t.Errorf("have %v\nwant %s", err, want)
			}
		}
	}
}

// nest is `"a": {"b": value}` of a.b.
func nest(key, value string) string {
	if outer, inner, ok := strings.Cut(key, "."); ok {
		return fmt.Sprintf("%q: {%s}", outer, nest(inner, value))
	}
	return fmt.Sprintf("%q: %s", key, value)
}

func TestParseMalformed(t *testing.T) {
	for _, tt := range []struct{ doc, key, reason string }{
		{``, Name, "the text is empty"},
		{`  `, Name, "the text is empty"},
		{`{"service": `, Name, "the text ends early, at byte 12"},
		{`{"service": {}} x`, Name, "more text after the value"},
		{`{} {}`, Name, "more text after the value"},
		{`<html>`, Name, "invalid character '<'"},
		{`[]`, Name, "want an object, have a list"},
		{`"ON"`, Name, "want an object, have a string"},
		{`{"service": {"serving-ports": [80, 0]}}`, "service.serving-ports[1]", "from 1 to 65535, have 0"},
		{`{"service": {"serving-ports": [65536]}}`, "service.serving-ports[0]", "have 65536"},
		{`{"service": {"serving-ports": [-1]}}`, "service.serving-ports[0]", "have -1"},
		{`{"service": {"serving-ports": [80.5]}}`, "service.serving-ports[0]", "have 80.5"},
		{`{"service": {"serving-ports": [1e99]}}`, "service.serving-ports[0]", "have 1e99"},
		{`{"service": {"serving-ports": ["80"]}}`, "service.serving-ports[0]", "want a whole number, have a string"},
		{`{"service": {"serving-ports": [15000]}}`, "service.serving-ports[0]", "15000 is a port of Envoy or the agent"},
		{`{"service": {"serving-ports": [15001]}}`, "service.serving-ports[0]", "15001 is a port"},
		{`{"service": {"serving-ports": [15006]}}`, "service.serving-ports[0]", "15006 is a port"},
		{`{"service": {"serving-ports": [15020]}}`, "service.serving-ports[0]", "15020 is a port"},
		{`{"proxy-spec": {"proxy-port": 16001}, "service": {"serving-ports": [80, 16001]}}`, "service.serving-ports[1]", "16001 is a port"},
		{`{"proxy-spec": {"proxy-port": 1024}}`, "proxy-spec.proxy-port", "from 1025 to 65535, have 1024"},
		{`{"proxy-spec": {"proxy-port": 15000}}`, "proxy-spec.proxy-port", "15000 is used by"},
		{`{"proxy-spec": {"tracing": "on"}}`, "proxy-spec.tracing", `want "ON" or "OFF"`},
		{`{"proxy-spec": {"xds-version": 4}}`, "proxy-spec.xds-version", "from 2 to 3"},
		{`{"proxy-spec": {"project-number": "my-project"}}`, "proxy-spec.project-number", `digits, have "my-project"`},
		{`{"proxy-spec": {"network": "a/nodes/b"}}`, "proxy-spec.network", "without slashes"},
		{`{"proxy-spec": {"mesh": "a\nb"}}`, "proxy-spec.mesh", `have "a\nb"`},
		{`{"proxy-spec": {"access-log": "access.log"}}`, "proxy-spec.access-log", "absolute path"},
		{`{"proxy-spec": {"access-log": "/var/log/envoy/../../../etc/passwd"}}`, "proxy-spec.access-log", "absolute path"},
		{`{"proxy-spec": {"access-log": "/var/log/a\nReadWritePaths=/"}}`, "proxy-spec.access-log", "control characters"},
		{`{"proxy-spec": {"access-log": "/var/log/a\u0000"}}`, "proxy-spec.access-log", "control characters"},
		{`{"proxy-spec": {"access-log": "/var/log/a\u2028b"}}`, "proxy-spec.access-log", "control characters"},
		{`{"proxy-spec": {"access-log": "/var/log/a\u2029b"}}`, "proxy-spec.access-log", "control characters"},
		// no UTF-8
		{`{"proxy-spec": {"access-log": "/var/log/a` + "\xff" + `b"}}`, "proxy-spec.access-log", "control characters"},
		{`{"proxy-spec": {"access-log": "/var/log/./a"}}`, "proxy-spec.access-log", "without . and .."},
		{`{"proxy-spec": {"scope": "a b"}}`, "proxy-spec.scope", `without slashes, spaces and control characters, have "a b"`},
		{`{"proxy-spec": {"mesh": "é"}}`, "proxy-spec.mesh", `without slashes, spaces`},
		{`{"proxy-spec": {"proxy-port": 15006}}`, "proxy-spec.proxy-port", "15006 is used by"},
		{`{"proxy-spec": {"proxy-port": 15020}}`, "proxy-spec.proxy-port", "15020 is used by"},
		{`{"proxy-spec": {"access-log": "/"}}`, "proxy-spec.access-log", "absolute path of a file"},
		{`{"proxy-spec": {"primary-source": "http://h/e.tgz?sig=SECRET"}}`, "proxy-spec.primary-source", `have scheme "http"`},
		{`{"proxy-spec": {"primary-source": "gs://bucket"}}`, "proxy-spec.primary-source", "names no file"},
		{`{"proxy-spec": {"secondary-source": "%zz?sig=SECRET"}}`, "proxy-spec.secondary-source", "want a gs://"},
		{`{"proxy-spec": {"primary-source": "file://host/x"}}`, "proxy-spec.primary-source", "names no file"},
		{`{"proxy-spec": {"primary-source": "file://"}}`, "proxy-spec.primary-source", "names no file"},
		{`{"proxy-spec": {"primary-source": "https:///e.tgz"}}`, "proxy-spec.primary-source", "names no file"},
		{`{"proxy-spec": {"secondary-source": "https://h/"}}`, "proxy-spec.secondary-source", "names no file"},
		{`{"proxy-spec": {"primary-source": "https://h/a\u2028b"}}`, "proxy-spec.primary-source", "want a gs://"},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": ["10.0.0.1", "example.com"]}}`,
			"traffic-interception.exclude-outbound-ip-ranges[1]", `want an IP address or CIDR range, have "example.com"`},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": ["10.0.0.0/33"]}}`, "traffic-interception.exclude-outbound-ip-ranges[0]", "/33"},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": ["10.0.0.0-10.0.0.9"]}}`, "traffic-interception.exclude-outbound-ip-ranges[0]", "10.0.0.9"},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": ["fe80::1%eth0"]}}`, "traffic-interception.exclude-outbound-ip-ranges[0]", "eth0"},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": [""]}}`, "traffic-interception.exclude-outbound-ip-ranges[0]", `have ""`},
		{`{"traffic-interception": {"exclude-outbound-port-ranges": ["80-"]}}`, "traffic-interception.exclude-outbound-port-ranges[0]", `have "80-"`},
		{`{"traffic-interception": {"exclude-outbound-port-ranges": ["0"]}}`, "traffic-interception.exclude-outbound-port-ranges[0]", `have "0"`},
		{`{"traffic-interception": {"exclude-outbound-port-ranges": ["70000"]}}`, "traffic-interception.exclude-outbound-port-ranges[0]", "70000"},
		{`{"traffic-interception": {"exclude-outbound-port-ranges": ["http"]}}`, "traffic-interception.exclude-outbound-port-ranges[0]", "http"},
		{`{"labels": {"b": 1, "a": null}}`, `labels["a"]`, "want a string, have null"},
		{`{"labels": {"a": "` + strings.Repeat("x", 1<<20) + `"}}`, Name, "bytes of text, want at most 524288"},
		{strings.Repeat("[", 20000), Name, "not JSON"},
	} {
		_, err := Parse([]byte(tt.doc))
		var keyErr *KeyError
		if !errors.As(err, &keyErr) {
			t.Errorf("%.80s: have %v, want a KeyError", tt.doc, err)
			continue
		}
		if keyErr.Key != tt.key || !strings.Contains(keyErr.Reason, tt.reason) {
			t.Errorf("%.80s:\nhave %s: %s\nwant %s: …%s…", tt.doc, keyErr.Key, keyErr.Reason,
				tt.key, tt.reason)
		}
		checkLine(t, err)
		if strings.Contains(err.Error(), "SECRET") {
			t.Errorf("the error shows a URL's query: %v", err)
		}
	}
}

// checkLine says that the error fits a guest attribute: one line of at most 1 KB.
func checkLine(t *testing.T, err error) {
	t.Helper()
	if s := err.Error(); strings.ContainsAny(s, "\n\r\x00") || len(s) > 1024 {
		t.Errorf("the error is not one line of at most 1 KB: %q", s)
	}
}

func TestParseAccepts(t *testing.T) {
	for _, tt := range []struct {
		doc  string
		want func(*Config)
	}{
		{`{}`, func(*Config) {}},
		{`{"service": {}, "traffic-interception": {}, "labels": {}, "proxy-spec": {}}`, func(*Config) {}},
		{`{"service": {"serving-ports": [8080, 22, 80, 8080]}}`, func(c *Config) {
			c.ServingPorts = []uint16{22, 80, 8080}
			c.Warnings = []string{
				"service.serving-ports: 22 sends SSH through Envoy; a broken mesh then locks you out"}
		}},
		{`{"traffic-interception": {"exclude-outbound-ip-ranges": ["2001:db8::1", "2001:db8::1/32", "10.1.2.3/8", "::ffff:192.0.2.7", "::ffff:192.0.2.7/120"]}}`,
			func(c *Config) {
				for _, s := range []string{"2001:db8::1/128", "2001:db8::/32", "10.0.0.0/8", "192.0.2.7/32",
					"192.0.2.0/24"} {
					c.ExcludeOutboundIPRanges = append(c.ExcludeOutboundIPRanges, netip.MustParsePrefix(s))
				}
			}},
		{`{"proxy-spec": {"xds-version": 2, "tracing": "OFF", "proxy-port": 16001}}`, func(c *Config) {
			c.ProxyPort = 16001
			c.Warnings = []string{
				"proxy-spec.xds-version: version 2 is gone from Envoy since 1.18; 3 is used"}
		}},
		{`{"api-version": "0.3", "new-key": 1, "proxy-spec": {"a\nb": 2}, "service": {"x": null}}`, func(c *Config) {
			c.Unknown = []string{"new-key", `proxy-spec."a\nb"`, "service.x"}
			c.Warnings = []string{`api-version: "0.3" is not the version this agent knows, 0.2`}
		}},
		// logged: cut
		{`{"` + strings.Repeat("k", 64) + `": 1, "` + strings.Repeat("l", 65) + `": 2}`, func(c *Config) {
			c.Unknown = []string{`"` + strings.Repeat("l", 64) + `"`, strings.Repeat("k", 64)}
		}},
		{`{"labels": {"a\nb": "c\u0000\u001b[1m\"'", "": "x", "TRAFFICDIRECTOR_NETWORK_NAME": "evil"}}`, func(c *Config) {
			c.Labels = map[string]string{"a\nb": "c\x00\x1b[1m\"'", "": "x",
				"TRAFFICDIRECTOR_NETWORK_NAME": "evil"}
		}},
		{`{"proxy-spec": {"primary-source": "https://h/e.tgz?sig=1#sha256=00", "secondary-source": "file:///opt/e.tgz"}}`, func(c *Config) {
			c.PrimarySource, c.SecondarySource = "https://h/e.tgz?sig=1#sha256=00", "file:///opt/e.tgz"
		}},
		{`{"proxy-spec": {"access-log": "/dev/stdout", "network": "", "mesh": "m", "scope": "s"}}`, func(c *Config) {
			c.AccessLog, c.Mesh, c.Scope = "/dev/stdout", "m", "s"
		}},
	} {
		want := Default()
		tt.want(&want)
		have, err := Parse([]byte(tt.doc))
		if err != nil {
			t.Errorf("%s: %v", tt.doc, err)
		}
		if diff := cmp.Diff(want, have, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Prefix) bool {
			return a == b
		})); diff != "" {
			t.Errorf("%s (-want +have):\n%s", tt.doc, diff)
		}
	}
}

// TestLimits: the limits that docs/attribute.md gives, each at its edge and one past it.
func TestLimits(t *testing.T) {
	x := strings.Repeat
	list := func(values string) string { return "[" + values + "]" }
	for _, tt := range []struct {
		key         string
		least, most string // are taken
		under, over string // are refused; "": there is no such edge
	}{
		{"service.serving-ports", list(`1`), list(`65535`), list(`0`), list(`65536`)},
		{"proxy-spec.proxy-port", `1025`, `65535`, `1024`, `65536`},
		{"proxy-spec.xds-version", `2`, `3`, `1`, `4`},
		{"proxy-spec.network", `""`, `"` + x("n", 255) + `"`, "", `"` + x("n", 256) + `"`},
		{"proxy-spec.scope", `""`, `"` + x("n", 255) + `"`, "", `"` + x("n", 256) + `"`},
		{"proxy-spec.mesh", `""`, `"` + x("n", 255) + `"`, "", `"` + x("n", 256) + `"`},
		{"proxy-spec.project-number", `""`, `"` + x("9", 20) + `"`, "", `"` + x("9", 21) + `"`},
		{"proxy-spec.access-log", `"/a"`, `"/` + x("a", 4094) + `"`, `"/"`, `"/` + x("a", 4095) + `"`},
		// bytes, not letters
		{"proxy-spec.access-log", `""`, `"/` + x("é", 2047) + `"`, "", `"/` + x("é", 2048) + `"`},
		{"traffic-interception.exclude-outbound-port-ranges", list(`"1"`), list(`"65535"`), list(`"0"`), list(`"65536"`)},
		{"traffic-interception.exclude-outbound-port-ranges", list(`"1-1"`), list(`"1-65535"`), list(`"0-1"`), list(`"1-65536"`)},
		{"traffic-interception.exclude-outbound-port-ranges", list(`"2-1"`), list(`"65535-1"`), list(`"1-0"`), list(`"65536-1"`)},
		// Past the end is no range the wrong way round: a port that wraps would
		// exclude what nobody named.
		{"traffic-interception.exclude-outbound-port-ranges", list(`"80-70"`), list(`"70-80"`), list(`"70000-80"`), list(`"80-70000"`)},
		{"traffic-interception.exclude-outbound-port-ranges", list(`"1-2"`), list(`"1","2"`), list(`"1-2-3"`), list(`"-1"`)},
		{"traffic-interception.exclude-outbound-ip-ranges", list(`"0.0.0.0/0"`), list(`"255.255.255.255/32"`), list(`"256.0.0.0"`), list(`"1.2.3.4/33"`)},
		{"traffic-interception.exclude-outbound-ip-ranges", list(`"::/0"`), list(`"::1/128"`), list(`"1::2::3"`), list(`"::1/129"`)},
		// IPv4 in IPv6's clothes has no more than IPv4's addresses.
		{"traffic-interception.exclude-outbound-ip-ranges", list(`"::ffff:0.0.0.0/96"`), list(`"::ffff:1.2.3.4/128"`), list(`"::ffff:0.0.0.0/95"`), ""},
	} {
		for _, value := range []string{tt.least, tt.most} {
			if _, err := Parse([]byte("{" + nest(tt.key, value) + "}")); err != nil {
				t.Errorf("%s: %.20s…: %v", tt.key, value, err)
			}
		}
		for _, value := range []string{tt.under, tt.over} {
			var keyErr *KeyError
			if _, err := Parse([]byte("{" + nest(tt.key, value) + "}")); value != "" &&
				(!errors.As(err, &keyErr) || !strings.HasPrefix(keyErr.Key, tt.key)) {
				t.Errorf("%s: %.20s… of %d bytes: have %v, want it refused", tt.key, value, len(value), err)
			}
		}
	}
	for text, want := range map[string]PortRange{ // what a range excludes
		"81": {81, 81}, "8080-8090": {8080, 8090}, "8090-8080": {8080, 8090}, "1-65535": {1, 65535}, "7-7": {7, 7},
	} {
		cfg, err := Parse(
			[]byte("{" + nest("traffic-interception.exclude-outbound-port-ranges", list(`"`+text+`"`)) +
				"}"))
		if err != nil || len(cfg.ExcludeOutboundPortRanges) != 1 ||
			cfg.ExcludeOutboundPortRanges[0] != want {
			t.Errorf("%s: have %v, %v, want %v", text, cfg.ExcludeOutboundPortRanges, err, want)
		}
	}
	for spaces, taken := range map[int]bool{MaxSize - 2: true, MaxSize - 1: false} {
		if _, err := Parse([]byte(x(" ", spaces) + "{}")); (err == nil) != taken {
			t.Errorf("%d bytes of text: %v", spaces+2, err)
		}
	}
}

// A quarter of a megabyte of labels, as much as one metadata entry may hold, is read whole.
func TestParseManyLabels(t *testing.T) {
	labels := map[string]string{}
	for i := range 4000 {
		labels[fmt.Sprintf("label-%d", i)] = strings.Repeat("é", 20)
	}
	text, err := json.Marshal(map[string]any{"labels": labels})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := Parse(text)
	if err != nil || len(cfg.Labels) != 4000 {
		t.Fatalf("%d labels, %v", len(cfg.Labels), err)
	}
}

func TestAnthos(t *testing.T) {
	for doc, want := range map[string]error{
		`{"mode": "ON", "proxy-spec": {}}`:                  ErrAnthos,
		`{"asm-config": {}}`:                                ErrAnthos,
		`{"asm-config": {}, "api-version": "0.2"}`:          ErrAnthos,
		`{"mode": "ON", "asm-config": {}}`:                  ErrAnthos,
		`{"mode": "ON", "api-version": "0.2", "labels":{}}`: nil, // some newer gcloud's key
		`{"service": {"mode": "ON", "asm-config": {}}}`:     nil,
	} {
		if _, err := Parse([]byte(doc)); !errors.Is(err, want) {
			t.Errorf("%s: have %v, want %v", doc, err, want)
		}
	}
	checkLine(t, ErrAnthos)
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.attr")
	if err != nil || len(files) == 0 {
		f.Fatal("no captures in testdata", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := Parse(text)
		if err != nil {
			checkLine(t, err)
			return
		}
		for _, port := range cfg.ServingPorts {
			if port == 0 || port == cfg.ProxyPort || port == EnvoyAdminPort || port == InboundPort ||
				port == AgentPort {
				t.Errorf("serving port %d got through", port)
			}
		}
		for _, r := range cfg.ExcludeOutboundPortRanges {
			if r.First == 0 || r.First > r.Last {
				t.Errorf("port range %v got through", r)
			}
		}
		for _, p := range cfg.ExcludeOutboundIPRanges {
			if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
				t.Errorf("prefix %v got through", p)
			}
		}
		for _, s := range append(
			[]string{cfg.AccessLog, cfg.Network, cfg.Scope, cfg.Mesh, cfg.ProjectNumber}, cfg.Unknown...) {
			if strings.ContainsAny(s, "\n\x00") {
				t.Errorf("%q got through", s)
			}
		}
	})
}
