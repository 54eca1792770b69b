package envoyadmin

import (
	"bytes"
	"fmt"
	"io"
)

const (
	// bytes of a string that are read; the longest that says anything is what Envoy says of a
	// configuration that it refused
	maxString = 64 << 10
	// bytes of a string that are read over
	maxLongString = 64 << 20
)

// shortener hands JSON on with every string cut to maxString bytes. A control plane may call a
// listener by a megabyte, which is no reason to lose sight of all the others. A character that is
// cut in two is no UTF-8 then, which the decoder allows; an escape sequence is kept whole.
//
// Strings are followed by their quotes and backslashes alone. That is right for JSON, and bytes
// that are none the decoder finds.
type shortener struct {
	from     io.Reader
	inside   bool // a string
	dropping bool // the rest of it
	escape   bool // a backslash came, and what it is for comes
	hex      int  // digits to come behind \u
	length   int  // of the string by now
}

func (s *shortener) Read(p []byte) (int, error) {
	for {
		n, err := s.from.Read(p)
		kept := s.shorten(p[:n])
		if s.length > maxLongString {
			return 0, fmt.Errorf("%w: a string of more than %d bytes", ErrTooLarge, maxLongString)
		}
		if kept > 0 || err != nil || n == 0 {
			return kept, err
		}
	}
}

// shorten takes out of p what is too much, and says how much is left at its beginning.
func (s *shortener) shorten(p []byte) (kept int) {
	for at := 0; at < len(p); {
		n := s.scan(p[at:])
		keep := n
		if n == 0 {
			n, keep = s.next(p[at:])
		}
		kept += copy(p[kept:], p[at:at+keep])
		at += n
	}
	return kept
}

// scan is how many bytes at the beginning of p are kept whatever comes. It is what nearly all are
// read by, and so must be quick.
func (s *shortener) scan(p []byte) (n int) {
	if s.escape || s.hex > 0 || s.dropping {
		return 0
	}
	inside, start := s.inside, -s.length
scan:
	for n < len(p) {
		switch c := p[n]; {
		case !inside:
			n++
			if c == '"' {
				inside, start = true, n
			}
		case n-start >= maxString:
			break scan
		case c == '"':
			inside = false
			n++
		case c != '\\':
			n++
		case n+6 > len(p): // what follows may be in the next piece
			break scan
		case p[n+1] == 'u':
			n += 6
		default:
			n += 2
		}
	}
	s.inside, s.length = inside, 0
	if inside {
		s.length = n - start
	}
	return n
}

// next takes a piece from the beginning of p, and says how long it is and how much of it to keep.
func (s *shortener) next(p []byte) (n, keep int) {
	switch {
	case !s.inside:
		if n = bytes.IndexByte(p, '"') + 1; n == 0 {
			return len(p), len(p)
		}
		s.inside, s.dropping, s.length = true, false, 0
		return n, n
	case s.escape:
		if s.escape = false; p[0] == 'u' {
			s.hex = 4
		}
		n = 1
	case s.hex > 0:
		s.hex--
		n = 1
	case p[0] == '"':
		s.inside, s.dropping, s.length = false, false, 0
		return 1, 1
	case p[0] == '\\':
		s.escape, s.dropping = true, s.length >= maxString
		n = 1
	default:
		n = len(p)
		if quote := bytes.IndexByte(p, '"'); quote >= 0 {
			n = quote
		}
		if backslash := bytes.IndexByte(p[:n], '\\'); backslash >= 0 {
			n = backslash
		}
		keep = min(n, max(maxString-s.length, 0))
		s.length += n
		return n, keep
	}
	s.length += n
	if s.dropping {
		return n, 0
	}
	return n, n
}
