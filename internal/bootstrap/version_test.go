package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"
)

// The oldest Envoy that is taken, and how its words are read.
func TestOldestEnvoy(t *testing.T) {
	for _, tt := range []struct{ says, version, fails string }{
		{"envoy  version: abc/1.24.9/Clean/RELEASE/BoringSSL", "1.24.9", ""},
		{"envoy  version: abc/1.25.0-dev/Modified/RELEASE/BoringSSL", "1.25.0", ""},
		{"envoy  version: abc/2.0.0/Clean", "2.0.0", ""},
		{"envoy  version: abc/1.24.8/Clean", "1.24.8",
			"bad Envoy: version 1.24.8 is too old, want 1.24.9 or later"},
		{"envoy  version: abc/0.99.99/Clean", "0.99.99",
			"bad Envoy: version 0.99.99 is too old, want 1.24.9 or later"},
		{"envoy 1.30.1", "", `bad Envoy: it does not say its version: "envoy 1.30.1\n"`},
	} {
		say := func(_ context.Context, cmd *exec.Cmd) error {
			_, err := fmt.Fprintln(cmd.Stdout, tt.says)
			return err
		}
		b := newBootstrapper(Options{Root: t.TempDir(), command: say})
		mkdir(t, b.path(filepath.Dir(EnvoyBinary)), 0o755)
		write(t, b.path(EnvoyBinary), "")
		have, err := b.envoyVersion(t.Context(), EnvoyBinary)
		if have != tt.version || (err != nil) != (tt.fails != "") ||
			err != nil && (err.Error() != tt.fails || !errors.Is(err, errBinary)) {
			t.Errorf("%q: have %q, %v", tt.says, have, err)
		}
	}
	const advice = "give primary-source=gs://BUCKET/OBJECT.tgz in --service-proxy, " +
		"or install Envoy 1.24.9 or later as /usr/local/bin/envoy"
	if envoyAdvice() != advice {
		t.Errorf("the advice is %q", envoyAdvice())
	}
}
