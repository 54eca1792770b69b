// Package recording writes values that hold errors as JSON, and reads them back so that errors.Is
// and errors.As say of each error what they said before. By it a look at one machine is judged on
// another one: see Looked.Record in package agent, the next in the flow.
//
// What is read may be anybody's. It is only data: no name in it is opened or run.
package recording

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// sentinels are the errors that what judges may ask for by errors.Is, by the names under which they
// are written. A name stays: older recordings have it.
var sentinels = map[string]error{
	"attribute.ErrMissing":        attribute.ErrMissing,
	"envoyadmin.ErrConnect":       envoyadmin.ErrConnect,
	"envoyadmin.ErrForbiddenPath": envoyadmin.ErrForbiddenPath,
	"envoyadmin.ErrLookUp":        envoyadmin.ErrLookUp,
	"envoyadmin.ErrRefused":       envoyadmin.ErrRefused,
	"envoyadmin.ErrTLS":           envoyadmin.ErrTLS,
	"envoyadmin.ErrTimeout":       envoyadmin.ErrTimeout,
	"envoyadmin.ErrTooLarge":      envoyadmin.ErrTooLarge,
	"iptables.ErrCouldNotLook":    iptables.ErrCouldNotLook,
	"iptables.ErrIncompatible":    iptables.ErrIncompatible,
	"iptables.ErrLocked":          iptables.ErrLocked,
	"iptables.ErrNoIPTables":      iptables.ErrNoIPTables,
	"iptables.ErrNoModules":       iptables.ErrNoModules,
	"iptables.ErrNotRoot":         iptables.ErrNotRoot,
	"fs.ErrPermission":            fs.ErrPermission,
}

// written is an error as it is written: its text, and what errors.Is and errors.As find in it.
type written struct {
	Text    string   `json:"text"`
	Is      []string `json:"is,omitempty"` // names of sentinels
	Probe   *probe   `json:"probe,omitempty"`
	Foreign *foreign `json:"foreign,omitempty"`
}

// probe is an envoyadmin.ProbeError, without its causes.
type probe struct {
	Target string `json:"target"`
}

// foreign is a sockdiag.ForeignError.
type foreign struct {
	Addr netip.AddrPort `json:"addr"`
	UID  uint32         `json:"uid"`
}

// replayed is an error that was read.
type replayed struct {
	text string
	is   []error
}

func (e *replayed) Error() string   { return e.text }
func (e *replayed) Unwrap() []error { return e.is }

func write(err error) *written {
	if err == nil {
		return nil
	}
	w := &written{Text: err.Error()}
	for _, name := range slices.Sorted(maps.Keys(sentinels)) {
		if errors.Is(err, sentinels[name]) {
			w.Is = append(w.Is, name)
		}
	}
	var asProbe *envoyadmin.ProbeError
	if errors.As(err, &asProbe) {
		w.Probe = &probe{asProbe.Target}
	}
	var asForeign *sockdiag.ForeignError
	if errors.As(err, &asForeign) {
		w.Foreign = &foreign{asForeign.Addr, asForeign.UID}
	}
	return w
}

func (w *written) read() error {
	if w == nil {
		return nil
	}
	e := &replayed{text: w.Text}
	for _, name := range w.Is {
		if sentinel, known := sentinels[name]; known && !slices.Contains(e.is, sentinel) {
			e.is = append(e.is, sentinel)
		}
	}
	if w.Probe != nil {
		e.is = append(e.is, &envoyadmin.ProbeError{Target: w.Probe.Target, Err: errors.New(w.Text)})
	}
	if w.Foreign != nil {
		e.is = append(e.is, &sockdiag.ForeignError{Addr: w.Foreign.Addr, UID: w.Foreign.UID})
	}
	return e
}

var options = json.JoinOptions(
	// Of *error: whatever else has a method Error (iptables.RefusedError) is written as it is.
	json.WithMarshalers(json.MarshalToFunc(func(e *jsontext.Encoder, err *error) error {
		return json.MarshalEncode(e, write(*err))
	})),
	jsonv1.FormatDurationAsNano(true),
	json.FormatNilSliceAsNull(true), // nil may be "not known", as of symptom.Facts.Scopes
	jsontext.AllowInvalidUTF8(true), // others' texts, which become printable where they are shown
)

// Marshal writes a value. Maps are sorted.
func Marshal(v any) ([]byte, error) {
	return json.Marshal(v, options, json.Deterministic(true), jsontext.WithIndent(" "))
}

// readError reads an error.
func readError(d *jsontext.Decoder, err *error) error {
	var w *written
	if e := json.UnmarshalDecode(d, &w); e != nil {
		return e
	}
	*err = w.read()
	return nil
}

// readTime reads a time, which must be one that can be written: 9999-12-31T23:59:59-01:00 can be
// read, and is of the year 10000 in UTC.
func readTime(d *jsontext.Decoder, t *time.Time) error {
	token, err := d.ReadToken()
	if err != nil || token.Kind() == 'n' {
		return err
	}
	if err := t.UnmarshalText([]byte(token.String())); err != nil {
		return err
	}
	if *t = t.UTC(); t.Year() < 0 || t.Year() > 9999 {
		return errors.New("a time before the year 0 or after 9999")
	}
	return nil
}

// perByte is how many bytes of memory a byte of JSON may become in structs. Marshal names each
// field, so that what it writes is about twice as long as they are. Without a limit some kilobytes
// of an archive, of "{},{},{}", become gigabytes.
const perByte = 2

// weighed counts the memory of structs, and stops where it is more than most bytes.
func weighed(most int) *json.Unmarshalers {
	return json.UnmarshalFromFunc(func(_ *jsontext.Decoder, v any) error {
		if t := reflect.TypeOf(v).Elem(); t.Kind() == reflect.Struct {
			if most -= int(t.Size()); most < 0 {
				return errors.New("it would take more memory than a recording does")
			}
		}
		return errors.ErrUnsupported
	})
}

// Unmarshal reads what Marshal wrote. Fields that are not known are passed over.
func Unmarshal(data []byte, v any) error {
	readers := json.WithUnmarshalers(json.JoinUnmarshalers(weighed(perByte*len(data)+1<<20),
		json.UnmarshalFromFunc(readError), json.UnmarshalFromFunc(readTime)))
	if err := json.Unmarshal(data, v, options, readers); err != nil {
		return fmt.Errorf("read JSON: %w", err)
	}
	return nil
}

// Fields are the paths of all fields within a type, sorted, as in "Envoy.Rejected.Name". By them
// whoever reads a recording of an older program knows which fields that had not got.
func Fields(t reflect.Type) []string {
	found := map[string]bool{}
	fields(t, "", found)
	return slices.Sorted(maps.Keys(found))
}

func fields(t reflect.Type, at string, found map[string]bool) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Array ||
		t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if at != "" {
		found[at] = true
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for f := range t.Fields() {
		switch {
		case f.Anonymous:
			fields(f.Type, at, found) // its fields are written as those of what holds it
		case f.IsExported():
			path := f.Name
			if at != "" {
				path = at + "." + path
			}
			fields(f.Type, path, found)
		}
	}
}
