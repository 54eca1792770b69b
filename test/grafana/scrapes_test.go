package grafana

import (
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/util/annotations"

	query "github.com/grafana/grafana-foundation-sdk/go/prometheus"
)

// interval is how often VMs are scraped, and end is when they were last.
const interval = 15 * time.Second

var end = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// scrape is what a VM told at one moment: samples by series, as /metrics writes them. nil: the
// agent gave no answer.
type scrape map[string]float64

// recording reads scrapes that test/e2e recorded, the first in full and then what changed, and
// moves them so that the last was at end.
func recording(t *testing.T, name string) (all []scrape) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	number := func(s string) float64 {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return v
	}
	now, at := scrape{}, 0.0
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if s, is := strings.CutPrefix(line, "# scrape "); is {
			at, now = number(s), maps.Clone(now)
			all = append(all, now)
		} else if series, is := strings.CutPrefix(line, "# gone "); is {
			delete(now, series)
		} else if !strings.HasPrefix(line, "#") {
			i := strings.LastIndexByte(line, ' ')
			now[line[:i]] = number(line[i+1:])
		}
	}
	if len(all) < 5 {
		t.Fatalf("%s: only %d scrapes", name, len(all))
	}
	for _, s := range all {
		s.later(float64(end.Unix())-at, "_timestamp_seconds", "process_start_time_seconds")
	}
	return all
}

// later adds seconds to what tells a time.
func (s scrape) later(seconds float64, names ...string) {
	for series := range s {
		name, _, _ := strings.Cut(series, "{")
		for _, n := range names {
			if strings.HasSuffix(name, n) {
				s[series] += seconds
			}
		}
	}
}

// quiet is an hour in which nothing happens after a scrape, which was an hour ago: time goes on.
func quiet(s scrape) (all []scrape) {
	s = maps.Clone(s)
	s.later(-3600, "_timestamp_seconds", "process_start_time_seconds")
	for range 3600 / int(interval.Seconds()) {
		s = maps.Clone(s)
		s.later(interval.Seconds(), "_timestamp_seconds")
		all = append(all, s)
	}
	return all
}

// absent is a target that gives no answer.
func absent() []scrape { return make([]scrape, 20) }

// prometheus is a data source.
type prometheus struct {
	t      *testing.T
	engine *promql.Engine
	series []storage.Series
}

var wholeLe = regexp.MustCompile(`\ble="([0-9]+)"`)

// scraped is a Prometheus that has scraped VMs, with the labels that deploy/prometheus gives them.
// wholes is whether it writes the bound of a bucket that is a whole number as it was scraped;
// Prometheus 3 makes 1.0 of 1.
func scraped(t *testing.T, wholes bool, vms map[string][]scrape) prometheus {
	t.Helper()
	parse := parser.NewParser(parser.Options{})
	p := prometheus{t: t, engine: promql.NewEngine(promql.EngineOpts{
		MaxSamples: 1e7, Timeout: time.Minute, Parser: parse,
	})}
	for name, scrapes := range vms {
		chunks := map[string]chunkenc.Appender{}
		add := func(series string, at int64, v float64) {
			if chunks[series] == nil {
				c := chunkenc.NewXORChunk()
				chunks[series], _ = c.Appender() // an empty one is no error
				p.series = append(p.series, &storage.SeriesEntry{
					Lset: target(t, parse, name, series, wholes),
					SampleIteratorFn: func(i chunkenc.Iterator) chunkenc.Iterator {
						return c.Iterator(i)
					},
				})
			}
			chunks[series].Append(0, at, v)
		}
		for i, s := range scrapes {
			at := end.Add(time.Duration(i+1-len(scrapes)) * interval).UnixMilli()
			if s == nil {
				add("up", at, 0)
				continue
			}
			add("up", at, 1)
			for series, v := range s {
				add(series, at, v)
			}
			if i > 0 {
				for series := range scrapes[i-1] {
					if _, there := s[series]; !there {
						add(series, at, math.Float64frombits(value.StaleNaN))
					}
				}
			}
		}
	}
	return p
}

// target is the labels of a series of a VM.
func target(t *testing.T, p parser.Parser, vm, series string, wholes bool) labels.Labels {
	t.Helper()
	if !wholes {
		series = wholeLe.ReplaceAllString(series, `le="$1.0"`)
	}
	l, err := p.ParseMetric(series)
	if err != nil {
		t.Fatalf("%s: %v", series, err)
	}
	return labels.NewBuilder(l).Set("job", "service-proxy-agent").Set("instance", vm).
		Set("project", "shop").Set("zone", "europe-west1-b").Set("instance_group", "web").Labels()
}

// Querier is a method of [storage.Queryable].
func (p prometheus) Querier(int64, int64) (storage.Querier, error) {
	return &storage.MockQuerier{SelectMockFunction: func(_ bool, _ *storage.SelectHints,
		matchers ...*labels.Matcher) storage.SeriesSet {
		found := &list{at: -1}
		for _, s := range p.series {
			if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool {
				return !m.Matches(s.Labels().Get(m.Name))
			}) {
				found.series = append(found.series, s)
			}
		}
		return found
	}}, nil
}

// list is a [storage.SeriesSet].
type list struct {
	series []storage.Series
	at     int
}

func (l *list) Next() bool                        { l.at++; return l.at < len(l.series) }
func (l *list) At() storage.Series                { return l.series[l.at] }
func (l *list) Err() error                        { return nil }
func (l *list) Warnings() annotations.Annotations { return nil }

// ask evaluates a panel's query as Grafana does: at the end, or over the minutes before it.
func (p prometheus) ask(q query.Dataquery, instance string, minutes int) promql.Matrix {
	p.t.Helper()
	expr := fill(q.Expr, instance)
	if q.Instant == nil || !*q.Instant {
		return p.between(expr, end.Add(-time.Duration(minutes)*time.Minute))
	}
	ask, err := p.engine.NewInstantQuery(p.t.Context(), p, nil, expr, end)
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	defer ask.Close()
	v, err := ask.Exec(p.t.Context()).Vector()
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	var m promql.Matrix
	for _, s := range v {
		m = append(m, promql.Series{Metric: s.Metric, Floats: []promql.FPoint{{T: s.T, F: s.F}}})
	}
	return m
}

// between evaluates an expression from a time to the end.
func (p prometheus) between(expr string, from time.Time) (m promql.Matrix) {
	p.t.Helper()
	ask, err := p.engine.NewRangeQuery(p.t.Context(), p, nil, expr, from, end, interval)
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	defer ask.Close()
	result, err := ask.Exec(p.t.Context()).Matrix()
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	for _, s := range result { // copied: Close takes the points back
		s.Floats = append([]promql.FPoint(nil), s.Floats...)
		m = append(m, s)
	}
	return m
}

// numbers are the samples that can be drawn, of those from a time on.
func numbers(m promql.Matrix, from time.Time) (all []float64) {
	for _, s := range m {
		for _, f := range s.Floats {
			if f.T >= from.UnixMilli() && !math.IsNaN(f.F) && !math.IsInf(f.F, 0) {
				all = append(all, f.F)
			}
		}
	}
	return all
}
