package envoyadmin

import (
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// Snapshot is what Envoy said at one time about its listeners.
type Snapshot struct {
	Listeners   []Listener // active and static ones
	Rejected    []Rejected
	Warming     []Warming
	Skipped     []Skipped
	Fingerprint Fingerprint   // equal to what Client.Fingerprint returns while nothing moves
	Names       []string      // of all dynamic listeners, whatever their state, sorted, each once
	Bytes       int64         // of the answer about dynamic listeners
	Took        time.Duration // from asking to the end of the answers
	Made        time.Time     // when that answer began to come: it was made just before
}

// Rejected is a listener that the control plane sent and Envoy refused. Another
// version of it may be active.
type Rejected struct {
	Name    string
	Details string    // Envoy's own words, without the configuration that it quotes (redaction.Text)
	When    time.Time // of the last attempt; zero if Envoy does not say
}

// Warming is a listener that Envoy took and that does not work yet: it waits for routes,
// secrets or the workers.
type Warming struct{ Name string }

// Skipped is a listener, or a part of one, that cannot be intercepted or is not understood.
type Skipped struct{ Listener, Reason string }

// Fingerprint tells whether anything moved in the listeners: two that are equal (==) are of the
// same state. It holds the names, the times of the last updates, which are warming, and the texts
// of rejections, but not how often something was rejected.
// See docs/design/facts.md#envoy-version-goes-stale.
type Fingerprint struct {
	Process                      uint64 // counts the Envoys that this Client has seen
	Listeners, Warming, Rejected int
	sum                          uint64
}

// The masks reach into no repeated field: such crashed Envoy (see maskSince).
// See docs/design/facts.md#envoy-masked-dump.
const (
	dynamicPath = "/config_dump?resource=dynamic_listeners"
	staticPath  = "/config_dump?resource=static_listeners"
	maskedPath  = dynamicPath +
		"&mask=name,active_state.last_updated,warming_state.last_updated,error_state.details"
	everythingPath  = "/config_dump" // for Envoy below 1.13
	maxReasons      = 10             // of one listener, then they are counted
	maxDetailsBytes = 8 << 10        // of one rejection
)

// Listeners asks for the listeners. What Envoy has rejected or is still warming is told apart from
// what is active. Static listeners are asked for once per Envoy process.
func (c *Client) Listeners(ctx context.Context) (Snapshot, error) {
	start := time.Now()
	dynamic, statics, process, err := c.dump(ctx, extent{whole: true})
	if err != nil {
		return Snapshot{}, err
	}
	return Snapshot{
		Listeners:   slices.Concat(statics.listeners, dynamic.listeners),
		Rejected:    dynamic.distinctRejected(),
		Warming:     dynamic.warming,
		Skipped:     slices.Concat(statics.skipped, dynamic.skipped),
		Fingerprint: dynamic.fingerprint(process),
		Names:       dynamic.distinctNames(),
		Bytes:       dynamic.bytes,
		Took:        time.Since(start),
		Made:        dynamic.made,
	}, nil
}

// dump asks for the dynamic listeners, and when whole, for the static ones.
func (c *Client) dump(
	ctx context.Context, of extent) (dynamic, statics *dump, process uint64, err error) {
	for attempt := 0; ; attempt++ {
		info, before, err := c.identify(ctx)
		if err != nil {
			return nil, nil, 0, err
		}
		dynamic, statics, err = c.dumpOf(ctx, info.Version, of)
		if err != nil {
			return nil, nil, 0, err
		}
		if _, process, err = c.identify(ctx); err != nil {
			return nil, nil, 0, err
		}
		if process == before {
			if of.whole {
				c.mu.Lock()
				if c.process == process {
					c.statics = statics
				}
				c.mu.Unlock()
			}
			return dynamic, statics, process, nil
		}
		if attempt == 2 {
			return nil, nil, 0, fmt.Errorf("get %q: %w: Envoy was replaced while it answered, three times",
				dynamicPath, ErrConnection)
		}
	}
}

func (c *Client) dumpOf(ctx context.Context, version Version,
	of extent) (dynamic, statics *dump, err error) {
	old := version != Version{} && version.Less(resourceSince)
	if old {
		dynamic, statics = &dump{whole: of.whole}, &dump{whole: of.whole}
		err = c.readDump(ctx, everythingPath, c.dumpLimit(), maxLong, dynamic, func(r *reader) error {
			return dynamic.section(r, statics)
		})
		if err == nil && !dynamic.found {
			err = fmt.Errorf("get %q: %w: it has no section of the listeners", everythingPath, ErrNotJSON)
		}
		return dynamic, statics, err
	}
	if !of.whole && (version == Version{} || !version.Less(maskSince)) {
		dynamic, err = c.look(ctx, of.names)
		return dynamic, nil, err
	}
	dynamic = &dump{whole: of.whole}
	if err := c.readDump(ctx, dynamicPath, c.dumpLimit(), maxLong, dynamic,
		dynamic.dynamicListener); err != nil || !of.whole {
		return dynamic, nil, err
	}
	c.mu.Lock()
	statics = c.statics
	c.mu.Unlock()
	if statics == nil {
		statics = &dump{whole: true}
		if err := c.readDump(ctx, staticPath, c.LongLimit, maxLong, statics,
			statics.staticListener); err != nil {
			return nil, nil, err
		}
	}
	return dynamic, statics, nil
}

func (c *Client) readDump(ctx context.Context, path string, limit time.Duration, maxBytes int64,
	d *dump, element func(*reader) error) error {
	q := LookQuestion
	if d.whole {
		q = DumpQuestion
	}
	began := time.Now()
	err := c.get(ctx, q, path, limit, maxBytes, func(body io.Reader) error {
		d.made = time.Now()
		r := newReader(body)
		err := r.document(func() error { return r.configs(element) })
		d.bytes = r.given
		return err
	})
	if d.whole && path != staticPath {
		c.dumped(time.Since(began), err)
	}
	return err
}

// configs reads a /config_dump: {"configs": [...]}.
func (r *reader) configs(element func(*reader) error) error { return r.list("configs", element) }

// list reads an object that holds a list. With nothing to list Envoy answers {}. An object that
// holds other things is someone else's answer: it must not be taken for an Envoy without listeners.
func (r *reader) list(of string, element func(*reader) error) error {
	var found, other bool
	err := r.object(func(name string) error {
		if name != of {
			other = true
			return r.skip()
		}
		found = true
		return r.array(func() error { return element(r) })
	})
	if err == nil && other && !found {
		return &shapeError{"there is no " + of + " in it"}
	}
	return err
}

// elementType reads an @type, which must be the one asked for: anything else was not made by a
// question with resource=.
func (r *reader) elementType(want string) error {
	var url string
	err := r.textInto(&url)
	if err == nil && !strings.HasSuffix(url, ".ListenersConfigDump."+want) {
		return fmt.Errorf("%w: an element of type %q", ErrNotJSON, url)
	}
	return err
}

// dump collects what the elements of one answer say.
type dump struct {
	found bool // the section of the listeners was there; only of a dump of everything
	whole bool // read the listeners too, not only what the fingerprint needs

	listeners []Listener
	rejected  []Rejected
	warming   []Warming
	skipped   []Skipped
	bytes     int64
	made      time.Time // when the answer began to come

	names   []string // in the order of the answer; a static listener may have none
	idle    []string // of these, those without an active state that has a time
	entries int
	sum     uint64
}

// section reads one section of a dump without resource=, and skips it unless it is the
// one of the listeners. The sections are told by what they hold, since only those of
// listeners have these names.
func (d *dump) section(r *reader, statics *dump) error {
	return r.object(func(name string) error {
		switch name {
		case "@type":
			var url string
			err := r.textInto(&url)
			d.found = d.found || strings.HasSuffix(url, ".ListenersConfigDump")
			return err
		case "dynamic_listeners":
			d.found = true
			return r.array(func() error { return d.dynamicListener(r) })
		case "dynamic_active_listeners": // up to 1.11
			d.found = true
			return r.array(func() error { return d.activeListener(r) })
		case "dynamic_warming_listeners":
			return r.array(func() error { return d.warmingListener(r) })
		case "static_listeners":
			d.found = true
			return r.array(func() error { return statics.staticListener(r) })
		}
		return r.skip()
	})
}

// entry is one element of dynamic_listeners, as far as the fingerprint goes.
type entry struct {
	name, updated, details string
	warming                bool
}

var seed = maphash.MakeSeed()

// add counts an entry. The sum does not depend on the order, which Envoy does not promise.
func (d *dump) add(e entry) {
	warming := "-"
	if e.warming {
		warming = "w"
	}
	d.entries++
	d.names = append(d.names, e.name)
	if e.updated == "" {
		d.idle = append(d.idle, e.name)
	}
	d.sum += maphash.Comparable(seed, [4]string{e.name, e.updated, e.details, warming})
	if e.warming {
		d.warming = append(d.warming, Warming{e.name})
	}
}

func (d *dump) fingerprint(process uint64) Fingerprint {
	return Fingerprint{Process: process, Listeners: d.entries, Warming: len(d.warming),
		Rejected: len(d.rejected), sum: d.sum}
}

// distinctRejected names each rejection once: Envoy tells it under the listener's name, and again
// without name or time, and after several attempts perhaps more often.
// See docs/design/facts.md#envoy-keeps-what-it-had.
func (d *dump) distinctRejected() []Rejected {
	type told struct{ name, details string }
	var distinct []Rejected
	at := make(map[told]int, len(d.rejected)) // of as many as a control plane likes to send
	for _, r := range d.rejected {
		i, known := at[told{r.Name, r.Details}]
		switch {
		case !known:
			at[told{r.Name, r.Details}] = len(distinct)
			distinct = append(distinct, r)
		case r.When.After(distinct[i].When):
			distinct[i].When = r.When
		}
	}
	return distinct
}

// dynamicListener reads an element of dynamic_listeners.
func (d *dump) dynamicListener(r *reader) error {
	var e entry
	var failed Rejected
	var active *Listener
	var reasons []string
	var version string
	var rejected bool
	err := r.object(func(name string) error {
		switch name {
		case "@type":
			return r.elementType("DynamicListener")
		case "name":
			return r.textInto(&e.name)
		case "active_state":
			return r.object(func(name string) error {
				switch name {
				case "version_info":
					return r.textInto(&version)
				case "last_updated":
					return r.textInto(&e.updated)
				case "listener":
					if d.whole {
						l, why, err := r.listener()
						active, reasons = &l, why
						return err
					}
				}
				return r.skip()
			})
		case "warming_state":
			e.warming = true
		case "error_state":
			rejected = true
			return r.object(func(name string) error {
				switch name {
				case "details":
					return r.textInto(&e.details)
				case "last_update_attempt":
					var at string
					err := r.textInto(&at)
					failed.When = parseTime(at)
					return err
				case "failed_configuration":
					return r.nameOf(&failed.Name) // never its addresses: they were refused
				}
				return r.skip()
			})
		}
		return r.skip()
	})
	if err != nil && !isShape(err) {
		return err
	}
	d.add(e)
	if rejected {
		if e.name != "" {
			failed.Name = e.name
		}
		if d.whole {
			// What Envoy quotes goes first: the reason is behind it.
			details := redaction.Text(e.details)
			failed.Details = strings.Clone(details[:min(len(details), maxDetailsBytes)])
		}
		d.rejected = append(d.rejected, failed)
	}
	if active != nil {
		if active.Name == "" {
			active.Name = e.name
		}
		active.Version, active.LastUpdated = version, parseTime(e.updated)
		d.keep(*active, reasons)
	}
	return d.notUnderstood(e.name, err)
}

// staticListener reads an element of static_listeners.
func (d *dump) staticListener(r *reader) error {
	var l Listener
	var reasons []string
	var found bool
	var updated string
	err := r.object(func(name string) (err error) {
		switch {
		case name == "@type":
			return r.elementType("StaticListener")
		case name == "listener" && d.whole:
			found = true
			l, reasons, err = r.listener()
			return err
		case name == "last_updated":
			return r.textInto(&updated)
		}
		return r.skip()
	})
	if err != nil && !isShape(err) {
		return err
	}
	if found {
		d.names = append(d.names, l.Name)
		l.Static, l.LastUpdated = true, parseTime(updated)
		d.keep(l, reasons)
	}
	return d.notUnderstood(l.Name, err)
}

// activeListener reads an element of dynamic_active_listeners, the form up to Envoy 1.11.
func (d *dump) activeListener(r *reader) error {
	var e entry
	var l Listener
	var reasons []string
	err := r.object(func(name string) (err error) {
		switch name {
		case "version_info":
			return r.textInto(&l.Version)
		case "last_updated":
			return r.textInto(&e.updated)
		case "listener":
			if d.whole {
				version := l.Version
				l, reasons, err = r.listener()
				l.Version = version
				e.name = l.Name
				return err
			}
			return r.nameOf(&e.name)
		}
		return r.skip()
	})
	if err != nil && !isShape(err) {
		return err
	}
	d.add(e)
	if d.whole {
		l.LastUpdated = parseTime(e.updated)
		d.keep(l, reasons)
	}
	return d.notUnderstood(e.name, err)
}

func (d *dump) warmingListener(r *reader) error {
	e := entry{warming: true}
	err := r.object(func(name string) error {
		if name == "listener" {
			return r.nameOf(&e.name)
		}
		return r.skip()
	})
	if err != nil && !isShape(err) {
		return err
	}
	d.add(e)
	return d.notUnderstood(e.name, err)
}

// nameOf reads the name of a listener and nothing else of it.
func (r *reader) nameOf(s *string) error {
	return r.object(func(name string) error {
		if name == "name" {
			return r.textInto(s)
		}
		return r.skip()
	})
}

// keep takes a listener over if anything of it is of use, and says what is not.
func (d *dump) keep(l Listener, reasons []string) {
	for _, reason := range reasons {
		d.skipped = append(d.skipped, Skipped{Listener: l.Name, Reason: reason})
	}
	if len(l.Addresses) > 0 {
		d.listeners = append(d.listeners, l)
	}
}

// notUnderstood turns a shape error into a line of Skipped: the rest goes on.
func (d *dump) notUnderstood(listener string, err error) error {
	if err != nil && isShape(err) {
		d.skipped = append(d.skipped, Skipped{Listener: listener, Reason: err.Error()})
		return nil
	}
	return err
}

// parseTime returns the zero time for what is no time: it is only shown.
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}
	}
	return t
}
