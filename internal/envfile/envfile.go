// Package envfile reads a file of environment variables as systemd does for EnvironmentFile=
// (systemd.exec(5), and parse_env_file_internal in systemd's src/basic/env-file.c), so that a
// command sees the settings that the daemon's unit has from the same file. It sets nothing.
package envfile

import "strings"

// Parse returns the variables of a file by name; of two of one name the later counts. What is no
// assignment is left out, as systemd does.
func Parse(text string) map[string]string {
	p := parser{all: map[string]string{}}
	for _, c := range []byte(strings.ReplaceAll(text, "\r\n", "\n")) {
		p.next(c)
	}
	if p.in == key { // without "="
		return p.all
	}
	p.end()
	return p.all
}

// place is where in an assignment the parser is.
type place uint8

const (
	before place = iota // of a name
	comment
	commentEscape
	key
	beforeValue // or behind a quoted part of it
	value
	escape // in an unquoted value
	single
	double
	doubleEscape
)

type parser struct {
	in         place
	name, said []byte
	kept       int // bytes of said that no white space at the end is cut from
	all        map[string]string
}

const (
	space    = " \t\n\r"
	comments = "#;"
	// escapable are the characters that a backslash stands before in double quotes.
	escapable = "\"\\`$"
)

func has(set string, c byte) bool { return strings.IndexByte(set, c) >= 0 }

func (p *parser) next(c byte) {
	switch p.in {
	case before:
		switch {
		case has(comments, c):
			p.in = comment
		case !has(space, c):
			p.in, p.name = key, append(p.name[:0], c)
		}
	case comment:
		switch c {
		case '\\':
			p.in = commentEscape
		case '\n':
			p.in = before
		}
	case commentEscape:
		p.in = comment
	case key:
		switch c {
		case '\n':
			p.in = before
		case '=':
			p.in, p.said, p.kept = beforeValue, p.said[:0], 0
		default:
			p.name = append(p.name, c)
		}
	default:
		p.inValue(c)
	}
}

func (p *parser) inValue(c byte) {
	switch p.in {
	case beforeValue, value:
		p.plain(c)
	case escape:
		if p.in = value; c != '\n' { // else the line goes on with the next
			p.keep(c)
		}
	case single:
		if c == '\'' {
			p.in = beforeValue
			return
		}
		p.keep(c)
	case double:
		switch c {
		case '"':
			p.in = beforeValue
		case '\\':
			p.in = doubleEscape
		default:
			p.keep(c)
		}
	case doubleEscape:
		p.in = double
		switch {
		case c == '\n':
		case has(escapable, c):
			p.keep(c)
		default:
			p.keep('\\')
			p.keep(c)
		}
	}
}

// plain takes a character outside of quotes, which begin only where no unquoted one stands before.
func (p *parser) plain(c byte) {
	switch {
	case c == '\n':
		p.end()
	case c == '\\':
		p.in = escape
	case p.in == beforeValue && c == '\'':
		p.in = single
	case p.in == beforeValue && c == '"':
		p.in = double
	case has(space, c):
		if p.in == value {
			p.said = append(p.said, c)
		}
	default:
		p.in = value
		p.keep(c)
	}
}

func (p *parser) keep(c byte) {
	p.said = append(p.said, c)
	p.kept = len(p.said)
}

// end takes in an assignment that is over.
func (p *parser) end() {
	switch p.in {
	case beforeValue, value, escape, single, double, doubleEscape:
		p.all[strings.TrimRight(string(p.name), space)] = string(p.said[:p.kept])
	}
	p.in = before
}
