package envoyadmin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
)

// TestShortener: strings that are short go through as they are, long ones are cut, and the document
// stays what it was otherwise, however it comes in pieces.
func TestShortener(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	long := func(of string) string { return strings.Repeat(of, 2*maxString/len(of)+1) }
	for name, values := range map[string][]string{
		"short":     {"", "a", `"`, `\`, `\"`, "\u2028", "é", "\n"},
		"plain":     {"before", long("x"), "after"},
		"quotes":    {long(`"`), `\\"`, long(`\`)},
		"escapes":   {long("\u0001"), "\u0001", long("\n\"")},
		"not ASCII": {long("日本"), "日本"},
	} {
		doc := map[string]any{"n": 1, "s": values, strings.Repeat("k", 10): []any{true, nil, values}}
		text, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		for pieces, from := range map[string]io.Reader{"whole": bytes.NewReader(text),
			"by byte": iotest.OneByteReader(bytes.NewReader(text)),
			"random":  &someBytes{bytes.NewReader(text), r}} {
			out, err := io.ReadAll(&shortener{from: from})
			if err != nil {
				t.Fatal(err)
			}
			var got struct{ S []string }
			if err := json.Unmarshal(out, &got); err != nil || len(got.S) != len(values) {
				t.Errorf("%s, %s: %v, %d strings", name, pieces, err, len(got.S))
				continue
			}
			for i, v := range values {
				whole := got.S[i] == v
				// encoding/json makes a replacement character of what is cut in two.
				begins := strings.HasPrefix(v, strings.TrimRight(got.S[i], "\uFFFD"))
				if len(v) < maxString/6 && !whole || whole && len(v) > maxString || !begins {
					t.Errorf("%s, %s: %d bytes of %d", name, pieces, len(got.S[i]), len(v))
				}
			}
		}
	}
	endless := io.MultiReader(strings.NewReader(`{"a":"`), neverEnds{})
	if _, err := io.Copy(io.Discard, &shortener{from: endless}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a string without end: %v", err)
	}
}

type someBytes struct {
	io.Reader
	r *rand.Rand
}

func (s *someBytes) Read(p []byte) (int, error) {
	return s.Reader.Read(p[:min(len(p), 1+s.r.IntN(50))])
}

type neverEnds struct{}

func (neverEnds) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// TestLongNames: a listener with a name of megabytes, and one with 100,000 prefixes in a chain,
// are read, and so is what stands beside them.
func TestLongNames(t *testing.T) {
	long := strings.Repeat("x", 5<<20)
	var prefixes strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&prefixes, `,{"address_prefix":"10.%d.%d.%d","prefix_len":32}`, i>>16, i>>8&255,
			i&255)
	}
	listener := func(name, match string) string {
		return fmt.Sprintf(`{"name":%q,"active_state":{"listener":{"@type":"type.googleapis.com/`+
			`envoy.config.listener.v3.Listener","name":%[1]q,"address":{"socket_address":{"address":`+
			`"0.0.0.0","port_value":15001}},"filter_chains":[{"name":%[1]q,"filter_chain_match":{%s}}]}}}`,
			name, match)
	}
	refused := fmt.Sprintf(`{"name":%q,"error_state":{"details":%[1]q}}`, long)
	body := `{"configs":[` + strings.Join([]string{listener(long, ""), refused,
		listener("many", `"prefix_ranges":[`+prefixes.String()[1:]+`]`),
		listener("sane", `"destination_port":80`)}, ",") + `]}`
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/server_info":
			io.WriteString(w, `{"version":"a/1.40.0/Clean/RELEASE/x","state":"LIVE"}`)
		case strings.Contains(r.URL.RawQuery, "dynamic_listeners"):
			io.WriteString(w, strings.ReplaceAll(body, `{"name"`,
				`{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.DynamicListener","name"`))
		default:
			io.WriteString(w, `{"configs":[]}`)
		}
	}))
	defer server.Close()
	c, err := New(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Listeners(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Listeners) != 3 || s.Listeners[2].Name != "sane" || len(s.Rejected) != 1 {
		t.Fatalf("%d listeners, %d rejected", len(s.Listeners), len(s.Rejected))
	}
	if n := len(s.Listeners[1].Chains[0].Prefixes); n != 100_000 {
		t.Errorf("%d prefixes", n)
	}
	if n := len(s.Listeners[0].Name); n > maxString {
		t.Errorf("a name of %d bytes", n)
	}
}
