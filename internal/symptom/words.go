package symptom

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// What findings say goes to terminals, journals, pages and guest attributes. Others have written
// some of it: a listener's name may be a megabyte long, or hold what moves a terminal's cursor. So
// say makes each part printable and short, and Check (see tidy) the whole. Whatever a finding
// holds, its Text stays below maxCause+maxNext, which is less than a guest attribute takes.
const (
	maxName     = 120 // of a listener, a cluster, a user
	maxShort    = 80
	maxWords    = 400 // an error, a reason, a rule
	maxCause    = 640
	maxNext     = 320
	maxKey      = 120
	maxEvidence = 500
	maxPieces   = 8 // of evidence, or commands
)

// say is fmt.Sprintf with arguments that others may have written.
func say(format string, args ...any) string {
	made := make([]any, len(args))
	for i, arg := range args {
		switch arg := arg.(type) {
		case string:
			made[i] = Printable(arg, maxWords)
		case error:
			made[i] = Printable(arg.Error(), maxWords)
		case fmt.Stringer:
			made[i] = Printable(arg.String(), maxWords)
		default:
			made[i] = arg
		}
	}
	return fmt.Sprintf(format, made...)
}

// safe is made of parts that are printable and short: say takes it as it is.
type safe string

// name is what others have called something, and short is it in a list.
func name(s string) string  { return Printable(s, maxName) }
func short(s string) string { return Printable(s, maxShort) }

// Printable is s in at most limit bytes, on one line, of runes that a terminal shows: others become
// the replacement character, spaces and line breaks one space. What is cut ends in "…".
func Printable(s string, limit int) string {
	const mark = "…"
	long := len(s) > 4*limit // more than is looked at: a rune is up to 4 bytes
	if long {
		s = s[:4*limit]
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return utf8.RuneError
	}, s)
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == ' ' }), " ")
	if len(s) <= limit && !long {
		return s
	}
	end := min(limit-len(mark), len(s))
	for end < len(s) && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + mark
}

// tidy makes a finding fit for wherever it goes. It is the last that is done to one.
func tidy(f *Finding) {
	f.Cause, f.Next = Printable(f.Cause, maxCause), Printable(f.Next, maxNext)
	if key := Printable(f.Key, maxKey); key != f.Key { // a hash: no two keys become one
		sum := fnv.New64a()
		sum.Write([]byte(f.Key))
		f.Key = fmt.Sprintf("%s#%016x", Printable(f.Key, maxKey-17), sum.Sum64())
	}
	// A copy: what facts hold is read by others at the same time.
	f.Evidence = slices.Clone(f.Evidence[:min(len(f.Evidence), maxPieces)])
	for i := range f.Evidence {
		e := &f.Evidence[i]
		e.Text, e.Time = Printable(e.Text, maxEvidence), e.Time.UTC()
	}
	if !f.Since.IsZero() {
		f.Since = f.Since.UTC()
	}
	f.Commands = f.Commands[:min(len(f.Commands), maxPieces)]
}

// finding makes one, without a key. What its next step holds of others comes by say or name.
func finding(id ID, row int, s Severity, next, cause string, args ...any) Finding {
	return Finding{ID: id, Row: row, Severity: s, Cause: say(cause, args...), Next: next}
}

// seen adds evidence; without a text there is none.
func (f Finding) seen(from Source, when time.Time, text string) Finding {
	if text != "" {
		f.Evidence = append(f.Evidence, Evidence{Source: from, Time: when, Text: text})
	}
	return f
}

// try adds commands.
func (f Finding) try(commands ...string) Finding {
	f.Commands = append(f.Commands, commands...)
	return f
}

// under gives the key.
func (f Finding) under(key string) Finding {
	f.Key = key
	return f
}

// few names the first n of all, and how many there are besides: "a, b and 7 more".
func few[T any](all []T, n int, say func(T) string) safe {
	if len(all) == n+1 {
		n++ // "and 1 more" is no shorter
	}
	var out strings.Builder
	for i, one := range all[:min(n, len(all))] {
		switch {
		case i == 0:
		case i == len(all)-1:
			out.WriteString(" and ")
		default:
			out.WriteString(", ")
		}
		out.WriteString(say(one))
	}
	if len(all) > n {
		fmt.Fprintf(&out, " and %d more", len(all)-n)
	}
	return safe(out.String())
}
