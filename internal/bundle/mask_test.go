package bundle

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the expected files")

// TestConfig: what people need of a configuration stays, and nothing else.
func TestConfig(t *testing.T) {
	in, err := os.ReadFile("testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/config.golden")
	if err != nil && !*update {
		t.Fatal(err)
	}
	have, err := Config(in)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("testdata/config.golden", have, 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(string(want), string(have)); diff != "" {
		t.Errorf("(-want +have):\n%s", diff)
	}
	if bytes.Contains(have, []byte("s3cr3t")) {
		t.Errorf("a secret is in it:\n%s", have)
	}
}

// TestSecretsLikeWords: what looks like a word of an enumeration or a number is a secret, too, in a
// field that holds one.
func TestSecretsLikeWords(t *testing.T) {
	for _, in := range []string{`{"client_secret":X}`, `{"secret_access_key":X}`, `{"session_token":X}`,
		`{"access_key_id":X}`, `{"hmac_secret":X}`, `{"api_key":X}`, `{"keys":[X]}`, `{"keys":[{"key":X}]}`,
		`{"call_credentials":[{"access_token":X},{"google_refresh_token":X}]}`, `{"json_key":X}`,
		`{"tcp_health_check":{"send":{"text":X},"receive":[{"binary":X}]}}`, `{"literal":X}`,
		`{"google_iam":{"authorization_token":X}}`, `{"credential":X}`,
		`{"metadata":X}`, `{"labels":[X]}`, `{"default_value":X}`, `{"substitution":X}`,
		`{"name":"user:X@host"}`, `{"header":{"raw_value":X}}`} {
		for _, secret := range []string{"HUNTER", "AKIAABCDEFGHIJKLMNOP", "31323334"} {
			doc := strings.ReplaceAll(strings.ReplaceAll(in, `"user:X@host"`, `"user:`+secret+`@host"`), "X",
				quoted(secret))
			have, err := Config([]byte(doc))
			if err != nil || bytes.Contains(have, []byte(secret)) {
				t.Errorf("%s: %s, %v", doc, have, err)
			}
		}
	}
	const harmless = `{"header":{"key":"x-added"},"type":"LOGICAL_DNS","max_age":"30s","token_bucket":` +
		`{"max_tokens":5,"fill_interval":"1s"},"header":{"append_action":"ADD_IF_ABSENT"}}`
	have, err := Config([]byte(harmless))
	if err != nil || bytes.Contains(have, []byte("masked")) {
		t.Errorf("%s: %s, %v", harmless, have, err)
	}
}

// A document that is cut off anywhere is still one, and says that it was cut.
func TestConfigThatIsCut(t *testing.T) {
	in, err := os.ReadFile("testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	in = bytes.TrimSpace(in)
	for n := 0; n < len(in); n += 13 {
		have, err := Config(in[:n])
		if err == nil {
			t.Errorf("cut at %d: no error", n)
		}
		if n > 0 && !json.Valid(have) || bytes.Contains(have, []byte("s3cr3t")) {
			t.Errorf("cut at %d: %s", n, have)
		}
	}
}

func TestJSONThatIsNone(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{`{"name":"a"} {"name":"b"}`, "{\n \"name\": \"a\"\n}\n"},
		{`{"name":"a",s3cr3t`, "{\n \"name\": \"a\"\n}\n"},
		{`{"a":s3cr3t}`, "{\n \"a\": null\n}\n"},
		{"<html>s3cr3t", "\n"},
		{strings.Repeat("[", 300) + `"s3cr3t"`, ""},
	} {
		have, err := Config([]byte(tt.in))
		if err == nil || tt.want != "" && string(have) != tt.want ||
			bytes.Contains(have, []byte("s3cr3t")) {
			t.Errorf("%.40q: %q, %v", tt.in, have, err)
		}
	}
	for in, want := range map[string]string{`"s3cr3t"`: `"[masked, 6 bytes]"`, "5": "5", "null": "null",
		"[]": "[]", "{}": "{}"} {
		if have, err := Config([]byte(in)); err != nil || strings.TrimSpace(string(have)) != want {
			t.Errorf("%s: %s, %v", in, have, err)
		}
	}
}

func TestAttribute(t *testing.T) {
	have, err := Attribute([]byte(`{"api-version":"0.2","labels":{"app":"s3cr3t","n":5},"x":"s3cr3t",` +
		`"service":{"serving-ports":[80]},"proxy-spec":{"network":"default","access-log":"/var/log/a",` +
		`"primary-source":"https://u:s3cr3t@h/envoy.tgz?X-Goog-Signature=s3cr3t","new":{"key":"s3cr3t"}}}`))
	want := `{"api-version":"0.2","labels":{"app":"[masked, 6 bytes]","n":"[masked]"},` +
		`"x":"[masked, 6 bytes]","service":{"serving-ports":[80]},"proxy-spec":{"network":"default",` +
		`"access-log":"/var/log/a","primary-source":"https://h/envoy.tgz","new":{"key":"[masked, 6 bytes]"}}}`
	var short bytes.Buffer
	if e := json.Compact(&short, have); err != nil || e != nil || short.String() != want {
		t.Errorf("have %s, %v, %v", short.String(), err, e)
	}
}

// TestText: one table of lines for each mask. What people need stays.
func TestText(t *testing.T) {
	lines := func(mask func([]byte) ([]byte, error)) func(string) string {
		return func(in string) string {
			out, err := mask([]byte(in))
			if err != nil {
				t.Error(err)
			}
			return strings.TrimSuffix(string(out), "\n")
		}
	}
	ours := []byte("[Service]\n# why\nExecStart=/usr/local/bin/envoy -c x\nEnvironment=GOTRACEBACK=all\n")
	masks := map[string]func(string) string{
		"lines": lines(Lines), "names": lines(Names), "quoting": lines(Quoting), "log": lines(EnvoyLog),
		"html": lines(HTML), "units": lines(Units([][]byte{ours})),
		"environment": lines(Environment([]string{"OURS"})),
		"told": func(in string) string {
			text, err := Told([]byte(`{"a":` + quoted(in) + "}"))
			var out struct{ A string }
			if e := json.Unmarshal(text, &out); err != nil || e != nil {
				t.Error(err, e)
			}
			return out.A
		},
	}
	for _, tt := range []struct{ mask, in, want string }{
		{"lines", "x\ttoken=s3cr3t&b", "x\ttoken=[...]"},
		{"lines", `-A INPUT -m comment --comment "x api_key=s3cr3t" -j DROP`, `-A INPUT -m comment --comment "x api_key=[...]" -j DROP`},
		{"lines", "chain OUTPUT {", "chain OUTPUT {"},
		{"lines", "x-api-key: s3cr3t, y", "x-api-key: [...], y"},
		{"lines", "Authorization: Basic s3cr3t", "Authorization: [...]"},
		{"lines", "set-cookie: a=s3cr3t; b=s3cr3t", "set-cookie: [...]"},
		{"lines", `{"client_secret": "s3cr3t", "x": 1}`, `{"client_secret": "[...]", "x": 1}`},
		{"lines", "PASSWORD=s3cr3t password: s3cr3t", "PASSWORD=[...] password: [...]"},
		{"lines", "no token: permission denied", "no token: permission denied"},
		{"lines", "a\x1b[31mred\x00", "a[31mred"},
		// What turns text round, or shows as nothing, goes; letters of any script stay.
		{"lines", "a\tb\u202edcba\u2066\u200b\u2028\u009b\ufeffx", "a\tbdcbax"},
		{"lines", "to\u200bken=s3cr3t 名前\u00a0é", "token=[...] 名前\u00a0é"},
		{"lines", "key:\n-----BEGIN RSA PRIVATE KEY-----\ns3cr3t\ns3cr3t\n-----END RSA PRIVATE KEY-----\nafter", "key:\n[...]\nafter"},
		// Spaces and quotes around a value, and spaces in it.
		{"lines", `secret="a s3cr3t", 'token' : 's3cr3t s3cr3t' x`, `secret="[...]", 'token' : '[...]' x`},
		{"lines", `client_secret = s3cr3t, {"token":"a\"s3cr3t"}`, `client_secret = [...], {"token":"[...]"}`},
		{"lines", "x --token s3cr3t --db-password s3cr3t -v", "x --token [...] --db-password [...] -v"},
		{"lines", "pwd=s3cr3t secret: s3cr3t", "pwd=[...] secret: [...]"},
		{"lines", "Bearer\ts3cr3t bearer: s3cr3t", "Bearer [...] bearer [...]"},
		{"lines", "Basic czNjcjN0OnMzY3IzdA== and czNjcjN0, basic auth, basic Authentication",
			"Basic [...] and czNjcjN0, basic auth, basic Authentication"},
		{"lines", "AIzaSyD-s3cr3t 1//0s3cr3t GOCSPX-s3cr3t ghp_s3cr3t AKIAIOSFODNN7EXAMPLE",
			"[...] [...] [...] [...] [...]"},
		// The beginning of a key may have been cut off.
		{"lines", "  " + strings.Repeat("s3cr3tAB", 8) + "\nafter", "[...]\nafter"},
		{"told", "-----BEGIN EC PRIVATE KEY-----\ns3cr3t\n-----END EC PRIVATE KEY-----\nafter", "[...]\nafter"},
		{"names", "cluster.http://h/x?k=s3cr3t.upstream_rq: 5", "cluster.http://h/x 5"},
		{"names", "a?s3cr3t::10.0.0.1:80::cx_active::5", "a::10.0.0.1:80::cx_active::5"},
		{"names", `x{cluster="a?s3cr3t"} 5`, `x{cluster="a"} 5`},
		{"quoting", `  value: "s3cr3t"`, `  value: "[...]"`},
		{"quoting", `'x-anything', 's3cr3t isn't'`, `'x-anything', '[...]'`},
		{"quoting", "Nov 29 vm envoy[1]: started", "Nov 29 vm envoy[1]: started"},
		{"quoting", "to https://h/x?sig=s3cr3t#s3cr3t: 403", "to https://h/x 403"},
		{"log", "[2026-11-29 04:00:00.1][1][info][x] [a.cc:1] add/update listener 'b'", "[2026-11-29 04:00:00.1][1][info][x] [a.cc:1] add/update listener 'b'"},
		{"log", "[2026-11-29 04:00:00.1][1][debug][http] [a.cc:1] request headers complete:\n':path', '/?s3cr3t'\n'a', 's3cr3t'\n\n[2026-11-29 04:00:00.2][1][info] next",
			"[2026-11-29 04:00:00.1][1][debug][http] [a.cc:1] request headers complete:\n  [2 more lines masked]\n[2026-11-29 04:00:00.2][1][info] next"},
		{"log", "[2026-11-29 04:00:00.1][1][warning] rejected: goo.gle/debugonly  \nvalue: \"s3cr3t\"\n: Proto constraint validation failed (AValidationError.B: value must be x)",
			"[2026-11-29 04:00:00.1][1][warning] rejected: [...]\n  [... 2 lines] Proto constraint validation failed (A.B: value must be x)"},
		{"log", "/usr/local/bin/envoy: error while loading shared libraries: libx.so", "/usr/local/bin/envoy: error while loading shared libraries: libx.so"},
		{"html", "<p title=x>Bearer s3cr3t</p><b>https://h/?a=s3cr3t&amp;b=s3cr3t</b>", "<p title=x>Bearer [...]</p><b>https://h/</b>"},
		{"html", `<a title="token=s3cr3t &quot;" class=x>y</a>`, `<a title="token=[...] &#34;" class=x>y</a>`},
		{"html", "<p>a &lt;b&gt;</p>", "<p>a &lt;b&gt;</p>"},
		{"units", "# /etc/systemd/system/x.service.d/y.conf\n[Service]\n# why\nExecStart=/usr/local/bin/envoy -c x\nEnvironment=GOTRACEBACK=all", "# /etc/systemd/system/x.service.d/y.conf\n[Service]\n# why\nExecStart=/usr/local/bin/envoy -c x\nEnvironment=GOTRACEBACK=all"},
		{"units", "ExecStart=/bin/x --key s3cr3t\n# s3cr3t\nEnvironment=A=s3cr3t \\\n  B=s3cr3t\nMemoryMax=5G\ns3cr3t",
			"ExecStart=[masked, 19 bytes]\n[masked, 8 bytes]\nEnvironment=[masked, 10 bytes]\n[masked, 10 bytes]\nMemoryMax=5G\n[masked, 6 bytes]"},
		{"units", "SetCredential=a:s3cr3t\nConditionEnvironment=A=s3cr3t\nEnvironment=A=\\\ns3cr3t\\\ns3cr3t\nUser=envoy",
			"SetCredential=[masked, 8 bytes]\nConditionEnvironment=[masked, 8 bytes]\nEnvironment=[masked, 3 bytes]\n[masked, 7 bytes]\n[masked, 6 bytes]\nUser=envoy"},
		{"environment", "OURS='https://h/x?s3cr3t'\nTHEIRS=s3cr3t\n# s3cr3t\nEMPTY=", "EMPTY=\"\"\nOURS=\"https://h/x\"\nTHEIRS=\"[masked, 6 bytes]\""},
	} {
		if have := masks[tt.mask](tt.in); have != tt.want {
			t.Errorf("%s of %q:\nhave %q\nwant %q", tt.mask, tt.in, have, tt.want)
		}
	}
}

// FuzzConfig: whatever a value is that people write, nothing of it is in what stays, and what stays
// is JSON.
func FuzzConfig(f *testing.F) {
	in, err := os.ReadFile("testdata/config.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(in, "")
	f.Add([]byte(`{"a":[{"b":{}}]}`), `"}`)
	f.Fuzz(func(t *testing.T, doc []byte, value string) {
		have, err := Config(doc)
		if json.Valid(doc) && (err != nil && !strings.Contains(err.Error(), "within each other")) {
			t.Errorf("%q: %v", doc, err)
		}
		if len(bytes.TrimSpace(have)) > 0 && !json.Valid(have) {
			t.Errorf("%q gives %q", doc, have)
		}
		const secret = "s3cr3t"
		quoted, _ := json.Marshal(value + secret + value)
		for _, form := range []string{
			`{"header":{"key":"a","value":X}}`, `{"metadata":{"name":X}}`, `{"a":[[X]]}`, placeholder,
			`{"string_match":{"prefix":X}}`, `{"typed_config":{"inline_code":X}}`, `{"value":{"name":[X]}}`,
		} {
			have, err := Config([]byte(strings.ReplaceAll(form, placeholder, string(quoted))))
			if err != nil || bytes.Contains(have, []byte(secret)) {
				t.Errorf("%s of %q: %s, %v", form, value, have, err)
			}
		}
	})
}

const placeholder = "X"
