package envoyadmin

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The questions of this file walk all clusters or all stats (0.5 s of Envoy's main thread at 10,000
// services): ask them at a Pace.

// Pace spaces an expensive question so that it takes at most one part in 1,000 of Envoy's main
// thread. The zero value is due.
type Pace struct {
	Floor time.Duration // at least this long between questions
	next  time.Time
}

// Due says whether the question may be asked.
func (p *Pace) Due(now time.Time) bool { return !now.Before(p.next) }

// Asked takes note of a question, answered or not.
func (p *Pace) Asked(began, ended time.Time) {
	p.next = ended.Add(max(p.Floor, 1000*ended.Sub(began)))
}

// ClusterHealth counts the endpoints of one cluster.
type ClusterHealth struct {
	Name                     string
	Total, Healthy, Degraded int // Degraded are not among Healthy
}

// FewHealthy says whether Envoy, by its default panic threshold of 50 %, ignores health and sends
// to all endpoints. Panics tells whether it did.
func (h ClusterHealth) FewHealthy() bool {
	return h.Total > 0 && 2*(h.Healthy+h.Degraded) < h.Total
}

// Clusters asks for the health of all endpoints, as counts.
func (c *Client) Clusters(ctx context.Context) ([]ClusterHealth, error) {
	const path = "/clusters?format=json"
	var all []ClusterHealth
	err := c.get(ctx, ClustersQuestion, path, c.LongLimit, maxLong, func(body io.Reader) error {
		r := newReader(body)
		return r.document(func() error {
			var found, other bool
			err := r.object(func(name string) error {
				if name != "cluster_statuses" {
					other = true
					return r.skip()
				}
				found = true
				return r.array(func() error {
					var h ClusterHealth
					err := r.object(func(name string) error {
						switch name {
						case "name":
							return r.textInto(&h.Name)
						case "host_statuses":
							return r.array(func() error { return r.host(&h) })
						}
						return r.skip()
					})
					all = append(all, h)
					return err
				})
			})
			if err == nil && other && !found {
				return &shapeError{"there is no cluster_statuses in it"}
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// host counts an element of host_statuses.
func (r *reader) host(h *ClusterHealth) error {
	state := Healthy
	err := r.object(func(name string) (err error) {
		if name != "health_status" {
			return r.skip()
		}
		state, err = r.health()
		return err
	})
	h.count(state)
	return err
}

// count counts an endpoint.
func (h *ClusterHealth) count(state Health) {
	h.Total++
	switch state {
	case Healthy:
		h.Healthy++
	case Degraded:
		h.Degraded++
	}
}

// Health is how an endpoint is, "healthy", "degraded" or what is against it: "failed active health
// check", "unhealthy", "draining", "timeout".
type Health string

const (
	Healthy  Health = "healthy"
	Degraded Health = "degraded"
)

// health reads a health_status: it has eds_health_status, and a field that is true for each way of
// having failed.
func (r *reader) health() (Health, error) {
	status := map[string]any{}
	if err := r.into(&status); err != nil {
		return Healthy, err
	}
	eds, _ := status["eds_health_status"].(string)
	var failed []string
	degraded := eds == "DEGRADED"
	for flag, value := range status {
		if set, _ := value.(bool); set {
			// failed_active_degraded_check means that the check succeeded and told the
			// endpoint to be degraded.
			degraded = degraded || flag == "failed_active_degraded_check"
			if strings.HasPrefix(flag, "failed_") && flag != "failed_active_degraded_check" {
				failed = append(failed, strings.ReplaceAll(flag, "_", " "))
			}
		}
	}
	slices.Sort(failed)
	switch {
	case len(failed) > 0:
		return Health(strings.Join(failed[:min(len(failed), 4)], ", ")), nil
	case eds == "UNHEALTHY", eds == "DRAINING", eds == "TIMEOUT":
		return Health(strings.ToLower(eds)), nil
	case degraded:
		return Degraded, nil
	}
	return Healthy, nil
}

// ControlPlane is what Envoy's stats say of its configuration.
type ControlPlane struct {
	Streams bool // Envoy takes configuration by a stream at all
	// one is open, or just being opened: it flaps to true at each attempt:
	// docs/design/facts.md#envoy-connected-flaps
	Connected                               bool
	Attempts, Successes, Failures, Rejected uint64 // of listener updates
	// listeners that were accepted and could not be bound, say
	CreateFailures uint64
	// Version is a hash of the version of the last listener update that this process took as a whole;
	// 0: none yet. After a hot restart the counters above begin with what the process before counted
	// in its last seconds, and this does not (Envoy's gauge lds.version is NeverImport).
	Version uint64
}

// ControlPlane asks for stats. A Version means that an LDS update was completed: before, an Envoy
// without listeners just has not heard of any.
// See docs/design/facts.md#envoy-live-without-listeners.
func (c *Client) ControlPlane(ctx context.Context) (ControlPlane, error) {
	var p ControlPlane
	seen := 0
	err := c.stats(ctx,
		`^(control_plane\.connected_state|listener_manager\.(lds\.(version|`+
			`update_(attempt|success|failure|rejected))|listener_create_failure))$`,
		func(name string, value uint64) {
			seen++
			switch name {
			case "control_plane.connected_state":
				p.Streams, p.Connected = true, value != 0
			case "listener_manager.lds.version":
				p.Version = value
			case "listener_manager.lds.update_attempt":
				p.Attempts = value
			case "listener_manager.lds.update_success":
				p.Successes = value
			case "listener_manager.lds.update_failure":
				p.Failures = value
			case "listener_manager.lds.update_rejected":
				p.Rejected = value
			case "listener_manager.listener_create_failure":
				p.CreateFailures = value
			default:
				seen--
			}
		})
	if err == nil && seen == 0 {
		err = fmt.Errorf("get stats: %w", ErrEmpty)
	}
	return p, err
}

// Panics asks how often each cluster ignored the health of its endpoints, since too few were
// healthy. Clusters where it never happened are left out.
func (c *Client) Panics(ctx context.Context) (map[string]uint64, error) {
	panics := map[string]uint64{}
	err := c.stats(ctx, `^cluster\..*\.lb_healthy_panic$`, func(name string, value uint64) {
		name, ok := strings.CutPrefix(name, "cluster.")
		if name, ok2 := strings.CutSuffix(name, ".lb_healthy_panic"); ok && ok2 && value > 0 {
			panics[name] = value
		}
	})
	if err != nil {
		return nil, err
	}
	return panics, nil
}

// stats asks for the counters and gauges whose name matches.
func (c *Client) stats(ctx context.Context, filter string,
	each func(name string, value uint64)) error {
	return c.statLines(ctx, filter, func(name, number string) error {
		if strings.ContainsAny(name, "<>{}\" ") {
			return errStatLines
		}
		if value, err := strconv.ParseUint(number, 10, 64); err == nil {
			each(name, value)
		}
		return nil
	})
}

var errStatLines = fmt.Errorf("%w: want lines of NAME: VALUE", ErrNotJSON)

// statLines asks for the stats whose name matches. A name may hold what people have written.
func (c *Client) statLines(ctx context.Context, filter string,
	each func(name, value string) error) error {
	path := "/stats?filter=" + url.QueryEscape(filter)
	return c.get(ctx, StatsQuestion, path, c.LongLimit, maxLong, func(body io.Reader) error {
		lines := bufio.NewScanner(body)
		lines.Buffer(nil, maxLine)
		for lines.Scan() {
			if len(bytes.TrimSpace(lines.Bytes())) == 0 {
				continue
			}
			name, number, ok := strings.Cut(lines.Text(), ": ")
			if !ok {
				return errStatLines
			}
			if err := each(name, number); err != nil {
				return err
			}
		}
		if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
			return fmt.Errorf("%w: a line of more than %d bytes", ErrTooLarge, maxLine)
		} else if err != nil {
			return err
		}
		return nil
	})
}
