// Package redaction takes out of other people's words what must not leave the VM.
//
// Envoy gives its reason for a refused configuration together with the configuration: a header's
// value, a token, a signed URL. The control plane may send the same back, and net/http quotes a
// redirect that it cannot follow. Everything of that kind goes through Text where it comes in
// (packages envoyadmin and internal/bootstrap), so that reports, logs and `status` need not care.
//
// It knows the forms in which Envoy 1.36.4 and 1.40.0 were seen to quote a configuration, and those
// in the source of older ones from 1.24.9 (see the tests), not what is secret: a service's name or
// address stays.
package redaction

import (
	"regexp"
	"slices"
	"strings"
)

// Mark stands for what was left out.
const Mark = "[...]"

// A message that breaks a constraint: the message, in protobuf's text format, with
// "goo.gle/debugonly" or the like before it in newer Envoys, and then in a line of its own
//
//	: Proto constraint validation failed (A: embedded message failed validation | caused by B: WHY)
//
// Up to about 1.30 it was "Proto constraint validation failed (…): MESSAGE". A quote before these
// words means that they are a value of the message, where line breaks are escaped.
var (
	constraint = regexp.MustCompile(`(?m)^(?:[^"\n]*: )?(Proto constraint validation failed \(.*)$`)
	embedded   = regexp.MustCompile(
		`: embedded message failed validation \| caused by \w+?ValidationError\.`)
	validation = regexp.MustCompile(`(\w)ValidationError\.`)
)

type rule struct {
	what *regexp.Regexp
	by   string
	// needs are texts in lower case, of which one is in whatever the rule matches. Most lines have
	// none of them, and to find that out takes a hundredth of the time.
	needs []string
}

// quoting are the other sentences in which Envoy quotes a configuration.
var quoting = []rule{
	{regexp.MustCompile(`goo\.gle/debug.*$`), Mark, []string{"goo.gle/debug"}},
	{regexp.MustCompile(`\b[\w.]+ \{\s*$`), Mark, []string{"{"}}, // KEY {
	{regexp.MustCompile(`([:=]) *(?:\{|\[ *["{]).*$`), "${1} " + Mark, []string{"{", `"`}},
	{regexp.MustCompile(`(Field '[^']*' is missing in:) .*$`), "${1} " + Mark,
		[]string{"is missing in:"}},
	// Lua's reason begins with the script
	{regexp.MustCompile(`(script load error:) .*$`), "${1} " + Mark, []string{"script load error:"}},
	// RE2's reasons end in the expression or a part of it.
	{regexp.MustCompile(`((?:^|: )(?:missing [\])]|unexpected \)|trailing \\|` +
		`bad repetition operator|no argument for repetition operator|` +
		`invalid (?:escape sequence|character class(?: range)?|repetition size|perl operator|` +
		`UTF-8|named capture group)):) .*$`), "${1} " + Mark,
		[]string{"missing ", "unexpected ", "trailing ", "repetition operator", "invalid "}},
	// A header's value with a % that is no command.
	{regexp.MustCompile(
		`(Incorrect configuration: ).*?(\. Couldn't find valid command at position \d+)?$`),
		"${1}" + Mark + "${2}", []string{"incorrect configuration: "}},
	// The same of Envoys before 1.27, which give their own part of it in quotes or brackets, too.
	{regexp.MustCompile(`(Invalid header configuration\. [\w %-]*)['"(].*$`), "${1}" + Mark,
		[]string{"invalid header configuration."}},
	{regexp.MustCompile(`(field )'.*'( not supported as custom header)`), "${1}" + Mark + "${2}",
		[]string{"not supported as custom header"}},
	{regexp.MustCompile(`(Not supported field in StreamInfo: ).*$`), "${1}" + Mark,
		[]string{"not supported field"}},
	// KEY: "VALUE"; but not: network "default".
	{regexp.MustCompile(`([:=,({[] *)"(?:[^"\\]|\\.)*(?:"|\\?$)`), `${1}"` + Mark + `"`,
		[]string{`"`}},
}

// anywhere are what is secret in any text.
var anywhere = []rule{
	{regexp.MustCompile("(?i)\\b(bearer)(?:\\s+|: *|=)[^\\s\"'`]+"), "${1} " + Mark,
		[]string{"bearer"}},
	// "Basic", and what is no word: base64 of a user and a password has a capital within or a "="
	{regexp.MustCompile(`(?i:\b(basic))\s+(?:[\w+/-]*[a-z0-9+/][A-Z][\w+/-]*=*|[\w+/-]{6,}=+)`),
		"${1} " + Mark, []string{"basic"}},
	// Google's access tokens, JSON Web Tokens
	{regexp.MustCompile(`\b(?:ya29\.|eyJ)[\w.~+/=-]+`), Mark, []string{"ya29.", "eyj"}},
	// Google's refresh tokens, keys of its APIs and secrets of its OAuth clients, and keys that others
	// give out: each begins with what nothing else does.
	{regexp.MustCompile(`\b(?:1//0|AIza|GOCSPX-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|` +
		`[sr]k_live_|(?:AKIA|ASIA)[A-Z2-7]{12})[\w-]{4,}`), Mark,
		[]string{"1//0", "aiza", "gocspx-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_", "glpat-",
			"xox", "k_live_", "akia", "asia"}},
	// the user and password of a URL
	{regexp.MustCompile(`://[^\s"'<>]*@`), "://", []string{"://"}},
	{regexp.MustCompile(`(://[^\s"'<>?#]*)[?#][^\s"'<>]*`), "${1}", []string{"://"}},
	// the query of a URL that is relative
	{regexp.MustCompile(`\?[^\s"'<>=]*=[^\s"'<>]*`), "", []string{"?"}},
}

// Text returns what may be told of text: one line without a message, a quoted value, a token, or
// the user and query of a URL. Of a message that breaks a constraint it keeps the path of the field
// and the constraint.
func Text(text string) string {
	text = strings.TrimSpace(text)
	if broken := brokenConstraints(text); broken != nil {
		var all []string
		for _, b := range broken {
			all = append(all, short(b[1]))
		}
		text = strings.Join(slices.Compact(all), "; ")
	} else {
		text, _, _ = strings.Cut(text, "\n")
		text = apply(quoting, text)
	}
	return strings.TrimSpace(apply(anywhere, text))
}

// Secrets returns text without tokens and without the user and query of a URL, and leaves what else
// may be a quotation as it is. It is for words of our own, in which Text would see quoted values.
func Secrets(text string) string { return apply(anywhere, text) }

func brokenConstraints(text string) [][]string {
	if !strings.Contains(text, "Proto constraint") {
		return nil
	}
	return constraint.FindAllStringSubmatch(text, -1)
}

// short is a broken constraint without the message behind it, and with the path of the field as one
// name: the reason is at its end, and a guest attribute is cut there.
func short(text string) string {
	if i := strings.Index(text, "): "); i >= 0 {
		text = text[:i+1]
	}
	if i := strings.LastIndexByte(text, ')'); i >= 0 { // none in a line that was cut
		text = text[:i+1]
	}
	return validation.ReplaceAllString(embedded.ReplaceAllString(text, "."), "${1}.")
}

func apply(rules []rule, text string) string {
	lower := strings.ToLower(text) // no rule adds what another one needs
	for _, r := range rules {
		if slices.ContainsFunc(r.needs, func(s string) bool { return strings.Contains(lower, s) }) {
			text = r.what.ReplaceAllString(text, r.by)
		}
	}
	return text
}
