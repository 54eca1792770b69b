package main

import "testing"

// TestHTMLUsage is 64 before anything is looked at.
func TestHTMLUsage(t *testing.T) {
	for _, args := range [][]string{{"--html", ""}, {"--html", "page.html", "-o", "json"},
		{"--html", "page.html", "--watch"}, {"--html", "page.html", "--envoy-admin", "x"}} {
		if code := execute(t.Context(), append([]string{"status"}, args...)); code != exitUsage {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}
