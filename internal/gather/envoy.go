package gather

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// What Envoy is asked, once each and one after the other: it answers on the thread that takes its
// updates, too. At 10,000 services, each with a cluster, that thread is busy for 1.8 s with the
// configuration (17 MB), for 0.5 s with the statistics and 0.1 s with the clusters (14 MB).
func (s Settings) ofEnvoy(look string) []Source {
	e := &envoy{admin: s.EnvoyAdmin}
	after := look
	var all []Source
	for _, q := range []struct {
		name, path string
		most       int
		limit      time.Duration
		mask       Mask
	}{
		// The first one waits, too, for what an earlier question left Envoy to do.
		{"envoy/server_info.json", "/server_info", mega, 8 * time.Second, config},
		{"envoy/config_dump.json", "/config_dump", 96 * mega, 13 * time.Second, config},
		{"envoy/listeners.txt", "/listeners", 4 * mega, 3 * time.Second, names},
		{"envoy/stats.txt", "/stats?usedonly&filter=" + url.QueryEscape(statsThatMatter), 4 * mega,
			5 * time.Second, names},
		{"envoy/clusters.txt", "/clusters", 64 * mega, 6 * time.Second, names},
	} {
		all = append(all, Source{Name: q.name, From: "GET " + q.path + " of Envoy", After: after,
			Limit: q.limit, Most: 2 * q.most, Mask: q.mask,
			Get: func(ctx context.Context) (Answer, error) { return e.ask(ctx, q.path, q.most) }})
		after = q.name
	}
	return all
}

// statsThatMatter are few, whatever the number of clusters.
const statsThatMatter = `^(server|listener_manager|cluster_manager|control_plane|main_thread|` +
	`workers|runtime|overload|http\.admin|filesystem|listener\.[^.]*\.(downstream_cx|no_filter).*$|` +
	`cluster\.xds[^.]*)\.`

// envoy asks. Its questions come one after the other.
type envoy struct {
	admin  string
	silent atomic.Value // the path of a question that had no answer
}

func (e *envoy) ask(ctx context.Context, path string, most int) (Answer, error) {
	if before := e.silent.Load(); before != nil {
		return Answer{}, fmt.Errorf("not asked: Envoy did not answer %s", before)
	}
	client, err := envoyadmin.New(e.admin)
	if err != nil {
		return Answer{}, err
	}
	defer client.Close()
	out := &kept{most: most}
	err = client.Copy(ctx, path, int64(most), func(body io.Reader) error {
		_, err := io.Copy(out, body)
		return err
	})
	switch {
	case errors.Is(err, envoyadmin.ErrTimeout), errors.Is(err, envoyadmin.ErrRefused),
		ctx.Err() != nil:
		e.silent.Store(path)
	case errors.Is(err, envoyadmin.ErrTooLarge):
		err, out.lost = nil, true
	}
	return out.answer(), err
}
