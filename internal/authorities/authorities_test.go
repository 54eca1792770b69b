package authorities

import (
	"os"
	"path/filepath"
	"testing"
)

// The VM's bundle is the first that is there and not empty.
func TestFile(t *testing.T) {
	const debian, redHat, suse = "/etc/ssl/certs/ca-certificates.crt",
		"/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"
	for _, tt := range []struct {
		files map[string]string
		want  string
	}{
		{nil, ""},
		{map[string]string{debian: "x", redHat: "x", suse: "x"}, debian},
		{map[string]string{debian: "", redHat: "x", suse: "x"}, redHat},
		{map[string]string{redHat: "", suse: "x"}, suse},
		{map[string]string{suse: ""}, ""},
	} {
		root := t.TempDir()
		for name, text := range tt.files {
			name = filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if have := File(root); have != tt.want {
			t.Errorf("with %v: %q, want %q", tt.files, have, tt.want)
		}
		if pool, err := Pool(root); err != nil || (pool == nil) != (tt.want == "") {
			t.Errorf("with %v: %v, %v", tt.files, pool, err)
		}
	}
}
