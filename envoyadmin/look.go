package envoyadmin

import (
	"context"
	"errors"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxNamed      = 32      // names of one look
	maxNamedBytes = 2 << 10 // of them together; Envoy refuses a request above 60 KB with 431
	// of a name that is not matched to its end, the least: fewer would match clusters too, which is
	// not wrong but costs what the names are to save
	leastNamed = 6
	// Envoy refuses larger programs of RE2 than 100 instructions with 400, unless the runtime key
	// re2.max_program_size.error_level says otherwise.
	maxProgram = 100
	// a look at all that takes less is as cheap as one by names, which is two questions
	namedFrom = 5 * time.Millisecond

	listenersPath = "/listeners?format=json"
)

// extent is how much of the dynamic listeners is asked for.
type extent struct {
	whole bool     // with all that is in them, and the static ones
	names []string // else of these alone, where that is cheaper; nil: of all
}

// Nameable says whether Fingerprint can ask for listeners of these names alone: 1 to 32 of them, at
// most 2 KB together, each a name, of characters that can be printed, and not too many that begin
// differently: one of any length, or some ten of any, since Envoy limits the expression. An Envoy
// with more listeners, like Istio's sidecars with one a service, is asked of all.
func Nameable(names []string) bool { return expression(names) != "" }

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// expression is a regular expression of RE2 that matches these names from begin to end, "" if they
// are not Nameable. It may match others that begin alike: they are answered for too, and known by
// their names. See docs/design/facts.md#envoy-dump-by-name.
//
// What all names begin with is behind a ^: RE2 compares it by itself, and no instruction of the
// program goes to it (RE2::Init, RequiredPrefix).
func expression(names []string) string {
	bytes := 0
	for _, name := range names {
		bytes += len(name)
		if name == "" || !utf8.ValidString(name) || strings.ContainsFunc(name, unprintable) {
			return ""
		}
	}
	if len(names) == 0 || len(names) > maxNamed || bytes > maxNamedBytes {
		return ""
	}
	begin := commonPrefix(names)
	rests := make([]string, len(names))
	longest := 0
	for i, name := range names {
		rests[i] = name[len(begin):]
		longest = max(longest, len(rests[i]))
	}
	if size(rests) <= maxProgram {
		return "^" + regexp.QuoteMeta(begin) + alternatives(rests) + "$"
	}
	for cut := longest - 1; cut >= 0 && len(begin)+cut >= leastNamed; cut-- {
		short := make([]string, len(rests))
		for i, rest := range rests {
			short[i] = whole(rest, cut)
		}
		slices.Sort(short)
		short = slices.Compact(short)
		if size(short)+3 <= maxProgram { // 3 for \C*, which is any byte
			return "^" + regexp.QuoteMeta(begin) + alternatives(short) + `\C*$`
		}
	}
	return ""
}

// size is an upper bound of the instructions of RE2's program for these alternatives: one for each
// byte, one for each alternative, and some at its begin and end (TestExpressionSize).
func size(alternatives []string) int {
	n := 5
	for _, a := range alternatives {
		n += len(a) + 1
	}
	return n
}

func alternatives(texts []string) string {
	if len(texts) == 1 {
		return regexp.QuoteMeta(texts[0])
	}
	quoted := make([]string, len(texts))
	for i, text := range texts {
		quoted[i] = regexp.QuoteMeta(text) // Go's syntax is RE2's
	}
	return "(?:" + strings.Join(quoted, "|") + ")"
}

// commonPrefix is what all names begin with.
func commonPrefix(names []string) string {
	first, last := slices.Min(names), slices.Max(names)
	n := 0
	for n < len(first) && n < len(last) && first[n] == last[n] {
		n++
	}
	return whole(first, n)
}

// whole are the first n bytes of s, less the begin of a character that does not fit.
func whole(s string, n int) string {
	if n >= len(s) {
		return s
	}
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// namedPath is a masked dump of these listeners alone. Envoy matches the whole name, with RE2; one
// that does not know the parameter answers for all listeners.
func namedPath(names []string) string {
	// Envoy leaves a + as it is, which QueryEscape means for a space.
	escaped := strings.ReplaceAll(url.QueryEscape(expression(names)), "+", "%20")
	return maskedPath + "&name_regex=" + escaped
}

// Fingerprint asks what Listeners would see by the cheapest question that tells: from Envoy 1.19 on
// a masked dump (1 ms of Envoy's main thread at 10 services, 30 ms at 10,000).
// See docs/design/facts.md#envoy-masked-dump.
//
// With the names of the last Snapshot, where they are Nameable, it asks of these listeners alone:
// about half of that at 10,000 clusters, since Envoy puts together each cluster whose name matches
// even for a dump of listeners (BenchmarkLook10000). The answer is that of nil all the same, but
// for one thing: a listener of another name is seen when it is active or rejected, not while it is
// warming or draining. Envoy's log tells of it then, or a look at all.
//
// nil asks of all listeners. So do names that are not Nameable, an Envoy that cannot be asked by
// names, and one that answered the last look at all within 5 ms.
func (c *Client) Fingerprint(ctx context.Context, names []string) (Fingerprint, error) {
	dynamic, _, process, err := c.dump(ctx, extent{names: names})
	if err != nil {
		return Fingerprint{}, err
	}
	return dynamic.fingerprint(process), nil
}

// misledLimit is how often in a row a look by names may be of no use until an Envoy is not asked so
// any more. A listener that comes and goes between two questions looks so too, but not often.
const misledLimit = 3

// look asks for the masked dump.
func (c *Client) look(ctx context.Context, names []string) (*dump, error) {
	c.mu.Lock()
	statics, misled, process := c.statics, c.misled, c.process
	named := statics != nil && misled < misledLimit && c.lookTook >= c.namedFrom && Nameable(names)
	c.mu.Unlock()
	if named {
		d, all, err := c.lookNamed(ctx, names, statics.names)
		var status *StatusError
		switch {
		case errors.As(err, &status) && status.Code >= 400 && status.Code < 500:
			// The runtime may allow shorter expressions only (400: maxProgram), and admin.allow_paths fewer
			// paths (403). Neither changes by itself while an Envoy runs.
			c.setMisled(process, misledLimit)
			named = false
		case err != nil:
			return nil, err
		case all:
			c.setMisled(process, 0)
			return d, nil
		}
	}
	d, began := &dump{}, time.Now()
	if err := c.readDump(ctx, maskedPath, c.ShortLimit, maxShort, d, d.dynamicListener); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.lookTook = time.Since(began)
	c.mu.Unlock()
	if named && slices.Equal(d.distinctNames(), distinct(names)) {
		c.setMisled(process, misled+1)
	}
	return d, nil
}

func (c *Client) setMisled(process uint64, times int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.process == process {
		c.misled = times
	}
}

// lookNamed asks for the masked dump of these listeners, and whether they are all that there is:
// none is gone and none has come.
func (c *Client) lookNamed(
	ctx context.Context, names, statics []string) (d *dump, all bool, err error) {
	d = &dump{}
	err = c.readDump(ctx, namedPath(names), c.ShortLimit, maxShort, d, d.dynamicListener)
	if err != nil || !contains(d.names, names) {
		return nil, false, err
	}
	var active []string
	err = c.get(ctx, LookQuestion, listenersPath, c.ShortLimit, maxShort,
		func(body io.Reader) error {
			r := newReader(body)
			return r.document(func() error {
				return r.list("listener_statuses", func(r *reader) error {
					var name string
					err := r.nameOf(&name)
					active = append(active, name)
					return err
				})
			})
		})
	// Of others that begin alike all was told too, and of all others by an Envoy that heeds no names;
	// but of another name's rejection nothing else.
	told := slices.DeleteFunc(slices.Clone(d.names), func(name string) bool {
		return slices.Contains(d.idle, name)
	})
	return d, err == nil && !more(active, slices.Concat(names, told), statics), err
}

// contains says whether all of these names are among those.
func contains(those, these []string) bool {
	return !slices.ContainsFunc(these, func(name string) bool { return !slices.Contains(those, name) })
}

// more says whether a listener is active that is neither among these names nor static. Envoy makes
// a name up for a static one that has none: as many are static as there are such.
func more(active, names, statics []string) bool {
	unknown := 0
	for _, name := range active {
		if !slices.Contains(names, name) && !slices.Contains(statics, name) {
			unknown++
		}
	}
	for _, name := range statics {
		if name == "" {
			unknown--
		}
	}
	return unknown > 0
}

// distinctNames are the names of the answer. A rejection that names no listener has none.
func (d *dump) distinctNames() []string { return distinct(d.names) }

// distinct are the names that are any, sorted, each once.
func distinct(names []string) []string {
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) > 0 && names[0] == "" {
		names = names[1:]
	}
	return names
}
