package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
)

// RotateLogs rotates Envoy's logs; see logs.Rotate.
func RotateLogs(opts Options) error {
	b := newBootstrapper(opts)
	name, err := b.configuredAccessLog()
	return errors.Join(logs.Rotate(b.Root, name), err)
}

// configuredAccessLog is what Envoy's configuration names as the access log, "" for none. (Not what
// the state names: the daemon's user, who writes there, could have root truncate any file.)
func (b *bootstrapper) configuredAccessLog() (string, error) {
	text, err := os.ReadFile(b.path(EnvoyConfig))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // bootstrap has not come so far
	}
	if err != nil {
		return "", fmt.Errorf("rotate the access log: %w", err)
	}
	var config struct {
		Node struct {
			Metadata map[string]any `json:"metadata"`
		} `json:"node"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return "", fmt.Errorf("rotate the access log: %q: %w", EnvoyConfig, err)
	}
	name, _ := config.Node.Metadata[accessLogKey].(string)
	return name, nil
}
