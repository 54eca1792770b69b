package main

import (
	"slices"
	"strings"
	"testing"
)

func TestWrap(t *testing.T) {
	for _, c := range []struct {
		text  string
		width int
		want  string
	}{
		{"", 10, ""},
		{"one", 10, "one"},
		{"one two three", 7, "one two|three"},
		{"  one \n two ", 80, "one two"},
		{"a muchlongerword b", 6, "a|muchlongerword|b"},
		{"äöü äöü", 7, "äöü äöü"}, // characters, not bytes
	} {
		if got := strings.Join(wrap(c.text, c.width), "|"); got != c.want {
			t.Errorf("wrap(%q, %d) = %q, want %q", c.text, c.width, got, c.want)
		}
	}
}

func TestTyped(t *testing.T) {
	got := typed([]string{"curl", "http://[fd10::1]/", "it's", "", "a=b"})
	if want := `curl 'http://[fd10::1]/' 'it'\''s' '' a=b`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestParsePrefix(t *testing.T) {
	for text, want := range map[string]string{
		"10.10.0.3": "10.10.0.3/32", "10.20.0.9/24": "10.20.0.0/24", "fd10::9": "fd10::9/128", "fd10::/64": "fd10::/64",
		"": "error", "10.10.0": "error", "web": "error", "10.0.0.0/33": "error", "fe80::1%eth0": "error",
	} {
		p, err := parsePrefix(text)
		got := p.String()
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("parsePrefix(%q) = %s, want %s", text, got, want)
		}
	}
}

func TestWithoutProxies(t *testing.T) {
	got := withoutProxies(
		[]string{"PATH=/bin", "http_proxy=x", "HTTPS_PROXY=x", "no_proxy=y", "ALL_PROXY=z"})
	if want := []string{"PATH=/bin", "no_proxy=y"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
