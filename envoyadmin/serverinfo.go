package envoyadmin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Version is Envoy's version.
type Version struct {
	Major, Minor, Patch int
}

// Envoy's versions where behaviour changes.
var (
	Minimum = Version{1, 9, 1} // older ones are not supported
	// Advised is the oldest that bootstrap installs or keeps; older ones are advised against. They
	// have no drain_listeners?graceful&skip_exit we can rely on, and known holes.
	Advised = Version{1, 24, 9}

	// resource= came with 1.13. Masks crashed Envoy up to 1.18.3 (envoyproxy/envoy#17257).
	// See docs/design/facts.md#envoy-masked-dump.
	resourceSince = Version{1, 13, 0}
	maskSince     = Version{1, 19, 0}
)

// ParseVersion reads the version of /server_info: "COMMIT/1.40.0/Clean/RELEASE/BoringSSL", or the
// number alone, "1.19.0-dev" included.
func ParseVersion(s string) (Version, error) {
	number := s
	if parts := strings.Split(s, "/"); len(parts) > 1 {
		number = parts[1]
	}
	core, _, _ := strings.Cut(number, "-")
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return Version{}, fmt.Errorf("parse version %q: want MAJOR.MINOR.PATCH", s)
	}
	var n [3]int
	for i, part := range parts {
		v, err := strconv.ParseUint(part, 10, 16)
		if err != nil {
			return Version{}, fmt.Errorf("parse version %q: %w", s, err)
		}
		n[i] = int(v)
	}
	return Version{n[0], n[1], n[2]}, nil
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Less says whether v is older than w.
func (v Version) Less(w Version) bool {
	if v.Major != w.Major {
		return v.Major < w.Major
	}
	if v.Minor != w.Minor {
		return v.Minor < w.Minor
	}
	return v.Patch < w.Patch
}

// ServerInfo is what Envoy says of itself.
type ServerInfo struct {
	Version  Version       // zero if VersionText cannot be parsed: a build of someone's own
	Text     string        // the version as /server_info has it
	State    string        // LIVE, DRAINING, PRE_INITIALIZING, INITIALIZING
	Uptime   time.Duration // of this process, in whole seconds, by the wall clock
	Epoch    int           // restart epoch: 0 without hot restart
	Node     Node
	LogPath  string // of --log-path; empty: standard error
	LogLevel string
	Config   string // of --config-path
	Asked    time.Time
}

// Node is how Envoy presents itself to the control plane.
type Node struct {
	ID, Cluster, Zone string
	Metadata          map[string]string // strings, numbers and booleans of the first level
}

// SameProcess says whether i and an earlier answer may come from the same process.
func (i ServerInfo) SameProcess(earlier ServerInfo) bool {
	const slack = 2 * time.Second // uptimes are whole seconds, and asking takes time
	// By the wall clock, as the uptimes.
	passed := i.Asked.Round(0).Sub(earlier.Asked.Round(0))
	off := i.Uptime - earlier.Uptime - passed
	return i.Epoch == earlier.Epoch && i.Text == earlier.Text && i.Node.ID == earlier.Node.ID &&
		off.Abs() <= slack
}

// ServerInfo asks /server_info: 2 ms of Envoy's main thread, of whatever size its configuration is.
func (c *Client) ServerInfo(ctx context.Context) (ServerInfo, error) {
	// The types of go-control-plane for this answer are in admin/v3, which adds 2.7 MB to the binary;
	// and most of the answer is the list of 800 extensions, which is skipped here.
	var answer struct {
		Version string `json:"version"`
		State   string `json:"state"`
		Uptime  string `json:"uptime_current_epoch"`
		Options struct {
			Epoch    jsontext.Value `json:"restart_epoch"` // a number, or as a 64-bit one a string
			LogPath  string         `json:"log_path"`
			LogLevel string         `json:"log_level"`
			Config   string         `json:"config_path"`
		} `json:"command_line_options"`
		Node nodeJSON `json:"node"`
	}
	dials, sent := c.dials.Load(), time.Now()
	err := c.get(ctx, ServerInfoQuestion, "/server_info", c.ShortLimit, maxShort,
		func(body io.Reader) error { return unmarshal(body, &answer) })
	if err != nil {
		return ServerInfo{}, err
	}
	if answer.Version == "" {
		return ServerInfo{}, fmt.Errorf("get %q: %w: it has no version", "/server_info", ErrNotJSON)
	}
	// of protobuf: "12s". Without it a restart is seen as one too many.
	uptime, _ := time.ParseDuration(answer.Uptime)
	epoch, _ := strconv.Atoi(strings.Trim(string(answer.Options.Epoch), `"`))
	info := ServerInfo{
		Text: answer.Version, State: answer.State, Uptime: uptime, Epoch: epoch, Node: answer.Node.node(),
		LogPath: answer.Options.LogPath, LogLevel: answer.Options.LogLevel, Config: answer.Options.Config,
		Asked: time.Now(),
	}
	if info.State == "" {
		info.State = "LIVE" // the enum's zero; 1.40 writes it out, older ones may not
	}
	info.Version, _ = ParseVersion(answer.Version)
	c.observe(info, dials, sent)
	return info, nil
}

// nodeJSON is the part of config.core.v3.Node that is looked at.
type nodeJSON struct {
	ID       string `json:"id"`
	Cluster  string `json:"cluster"`
	Locality struct {
		Zone string `json:"zone"`
	} `json:"locality"`
	Metadata map[string]jsontext.Value `json:"metadata"`
}

func (n nodeJSON) node() Node {
	node := Node{ID: n.ID, Cluster: n.Cluster, Zone: n.Locality.Zone}
	for key, value := range n.Metadata {
		var text string
		switch value.Kind() {
		case '"':
			if json.Unmarshal(value, &text, jsontext.AllowInvalidUTF8(true)) != nil {
				continue
			}
		case '0', 't', 'f':
			text = string(value)
		default:
			continue
		}
		if node.Metadata == nil {
			node.Metadata = map[string]string{}
		}
		node.Metadata[key] = text
	}
	return node
}

// unmarshal reads a small answer into v.
func unmarshal(body io.Reader, v any) error {
	r := newReader(body)
	return r.document(func() error {
		err := json.UnmarshalDecode(r.Decoder, v)
		var semantic *json.SemanticError
		if errors.As(err, &semantic) {
			return fmt.Errorf("%w: %w", ErrNotJSON, err)
		}
		return err
	})
}

// observe takes note of an answer of /server_info that was asked for when so many
// connections had been made.
func (c *Client) observe(info ServerInfo, dials uint64, sent time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.dials.Load()
	// The connections of before are open still: a process ends with its
	// connections, so this is the same.
	same := c.process > 0 && now == c.asOf
	if !same {
		// One that ran already when the known one is known to have run last is that one, since only one
		// has the address. Uptimes are of whole seconds at both ends, so one that is in doubt is taken
		// for another: that costs a dump too many, and the contrary would cost the rules of all that it
		// has not been told yet.
		started := info.Asked.Add(time.Second - info.Uptime)
		same = c.process > 0 && info.SameProcess(c.info) && started.Before(c.alive)
	}
	if !same {
		c.process++
		c.statics, c.misled = nil, 0
	}
	c.info, c.alive = info, sent
	// With a connection made while the question ran, the answer may have come over an older
	// one: ask again next time.
	c.asOf = now
	if now > dials+1 {
		c.asOf = dials
	}
}

// identify says which Envoy this is, asking it only if a connection is new.
func (c *Client) identify(ctx context.Context) (info ServerInfo, process uint64, err error) {
	c.mu.Lock()
	info, process = c.info, c.process
	known := process > 0 && c.asOf == c.dials.Load()
	c.mu.Unlock()
	if known {
		return info, process, nil
	}
	if info, err = c.ServerInfo(ctx); err != nil {
		return ServerInfo{}, 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.info, c.process, nil
}
