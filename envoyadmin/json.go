package envoyadmin

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// reader reads JSON as a stream. Two kinds of errors leave it: a *shapeError says that a value
// was not what was looked for; it has been read to its end, and the stream goes on. Any other
// error ends the stream.
type reader struct {
	*jsontext.Decoder
	from    io.Reader
	given   int64 // bytes handed to the decoder
	waiting int64 // how many of them may wait there for the end of a value
}

// shapeError is JSON without fault that is not understood.
type shapeError struct {
	reason string
}

func (e *shapeError) Error() string { return e.reason }

func isShape(err error) bool {
	var shape *shapeError
	return errors.As(err, &shape)
}

func newReader(from io.Reader) *reader {
	r := &reader{from: &shortener{from: from}, waiting: maxValue}
	// Bytes that are no UTF-8 in an access log format or an error text are no reason to lose the
	// listeners. Names are not looked at twice: the last one wins, and remembering them costs memory.
	r.Decoder = jsontext.NewDecoder((*readerInput)(r), jsontext.AllowInvalidUTF8(true),
		jsontext.AllowDuplicateNames(true))
	return r
}

// readerInput limits what one value may hold: the decoder keeps the bytes after the last token it
// gave out, so if many wait there, they are of one value (or of white space without end).
type readerInput reader

func (r *readerInput) Read(p []byte) (int, error) {
	if r.given-r.InputOffset() > r.waiting {
		return 0, fmt.Errorf("%w: one value of more than %d bytes", ErrTooLarge, r.waiting)
	}
	n, err := r.from.Read(p)
	r.given += int64(n)
	return n, err
}

// document reads the one value of an answer: value must read it. A shape error becomes ErrNotJSON,
// and so do bytes after the value.
func (r *reader) document(value func() error) error {
	err := value()
	if err == nil {
		if _, err = r.ReadToken(); err == nil {
			return fmt.Errorf("%w: there is more after its end", ErrNotJSON)
		} else if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
	}
	switch {
	case isShape(err):
		return fmt.Errorf("%w: %w", ErrNotJSON, err)
	case r.given == 0 && errors.Is(err, io.EOF):
		return ErrEmpty
	case strings.Contains(err.Error(), "exceeded max depth"):
		// the decoder's own limit, of 10,000, without a type
		return fmt.Errorf("%w: %w", ErrTooDeep, err)
	}
	return err
}

// object reads an object; field must read the value of each name. After a shape error in one field
// the others are still read.
func (r *reader) object(field func(name string) error) error {
	if r.PeekKind() != '{' {
		return r.other("an object")
	}
	if err := r.open(); err != nil {
		return err
	}
	var shape error
	for r.PeekKind() != '}' {
		// The name as raw bytes: Token.String would make a string of each. Envoy's names
		// hold nothing to unescape.
		raw, err := r.ReadValue()
		if err != nil {
			return err
		}
		switch err := field(fieldName(raw)); {
		case isShape(err):
			if shape == nil {
				shape = err
			}
		case err != nil:
			return err
		}
	}
	if _, err := r.ReadToken(); err != nil {
		return err
	}
	return shape
}

// fieldName returns the name of a field as the types call it today. Envoy 1.13 to 1.17 show
// what they took over from API v2 under a prefix. Known names cost no allocation, and the
// rest is not asked for.
func fieldName(quoted []byte) string {
	if len(quoted) < 2 {
		return ""
	}
	name := quoted[1 : len(quoted)-1]
	if known, ok := fieldNames[string(name)]; ok {
		return known
	}
	if rest, ok := strings.CutPrefix(string(name), "hidden_envoy_deprecated_"); ok {
		return fieldNames[rest]
	}
	return ""
}

// fieldNames holds each field name that this package looks at.
var fieldNames = func() map[string]string {
	m := map[string]string{}
	for name := range strings.FieldsSeq(`
		@type name configs bootstrap
		listener_statuses
		dynamic_listeners static_listeners dynamic_active_listeners dynamic_warming_listeners
		active_state warming_state error_state details last_update_attempt failed_configuration
		version_info listener last_updated
		address additional_addresses filter_chains default_filter_chain filter_chain_matcher
		filter_chain_match listener_filters
		bind_to_port deprecated_v1 use_original_dst traffic_direction fcds_config internal_listener
		api_listener
		filters typed_config config transport_socket tls_context rds route_config_name route_config
		cluster weighted_clusters clusters cluster_header
		virtual_hosts domains routes route
		cluster_statuses host_statuses health_status eds_health_status observability_name
		socket_address port_value
		node dynamic_resources static_resources admin`) {
		m[name] = name
	}
	return m
}()

// array reads an array; element must read each of its values. After a shape error in one the
// others are still read.
func (r *reader) array(element func() error) error {
	if r.PeekKind() != '[' {
		return r.other("an array")
	}
	if err := r.open(); err != nil {
		return err
	}
	var shape error
	for r.PeekKind() != ']' {
		switch err := element(); {
		case isShape(err):
			if shape == nil {
				shape = err
			}
		case err != nil:
			return err
		}
	}
	if _, err := r.ReadToken(); err != nil {
		return err
	}
	return shape
}

// text reads a string.
func (r *reader) text() (string, error) {
	if r.PeekKind() != '"' {
		return "", r.other("a string")
	}
	token, err := r.ReadToken()
	if err != nil {
		return "", err
	}
	return token.String(), nil
}

// textInto reads a string into s.
func (r *reader) textInto(s *string) (err error) {
	*s, err = r.text()
	return err
}

// other reads over a value that is not what was looked for.
func (r *reader) other(want string) error {
	kind := r.PeekKind()
	if err := r.skip(); err != nil {
		return err
	}
	return &shapeError{fmt.Sprintf("want %s, found %v", want, kind)}
}

// skip reads over a value of any size.
func (r *reader) skip() error {
	outside := r.StackDepth()
	switch r.PeekKind() {
	case '{', '[':
		for {
			if err := r.open(); err != nil {
				return err
			}
			if r.StackDepth() <= outside {
				return nil
			}
		}
	default:
		_, err := r.ReadToken()
		return err
	}
}

// open reads a token, which may be the start of an object or array.
func (r *reader) open() error {
	_, err := r.ReadToken()
	if err == nil && r.StackDepth() > maxDepth {
		err = fmt.Errorf("%w: more than %d levels", ErrTooDeep, maxDepth)
	}
	return err
}

// raw reads a value as a whole. It is valid until the next call.
func (r *reader) raw(max int64) (jsontext.Value, error) {
	r.waiting = max
	defer func() { r.waiting = maxValue }()
	return r.ReadValue()
}
