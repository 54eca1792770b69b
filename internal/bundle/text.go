package bundle

import (
	"bytes"
	"fmt"
	"html"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// called is what follows a word that says of itself what it is, as in "token=x", "x-api-key: x" and
// "'authorization', 'Basic x'". It is the last net, under those of package redaction. In prose, as
// in "no token: permission denied", such a word has no other before it, and stays.
var called = []struct {
	what func() *regexp.Regexp
	by   string
}{
	// All of the line.
	{pattern(`(?i)([\w-]*(?:authorization|cookie)["']?` +
		`(?: *[:=]|, *["']) *["']?)[^"'<>\n]+`), "${1}" + redaction.Mark},
	{pattern(`(?i)([\w-]*` + secretly + `[\w-]*["']? *= *)` + value), kept},
	{pattern(`(?i)((?:["'][\w-]*|[\w-]*[-_])` + secretly + `[\w-]*["']? *: *)` + value),
		kept},
	{pattern(`(?i)(` + secretly + `["'] *: *)` + value), kept},
	{pattern(`(?i)([\w-]*` + secretly + `[\w-]*["']?, *)` + quotedValue), kept},
	{pattern(`(?i)(\b(?:passw(?:or)?d|passphrase|secret|apikey) *: *)` + value), kept},
	// A flag, with its value behind a space.
	{pattern(`(?i)((?:^|\s)--?[\w-]*` + secretly + ` +)[^\s"'<>,;-][^\s"'<>,;]*`),
		"${1}" + redaction.Mark},
	{pattern(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|$)`),
		redaction.Mark},
}

// A value is quoted, or goes on up to where something else begins. Its quotes are kept.
const (
	quotedValue = `(?:(")(?:[^"\\]|\\.)+|(')[^'\n]+)`
	value       = `(?:` + quotedValue + `|[^\s"'<>,;]+)`
	kept        = "${1}${2}${3}" + redaction.Mark
)

const secretly = `(?:passw(?:or)?d|pwd|passphrase|secret|token|api[-_]?key|credential|` +
	`private[-_]?key|access[-_]?key|signature)`

// words are in whatever those match.
var words = strings.Fields(`authorization cookie passw pwd passphrase secret token api credential
	key signature`)

// Secrets takes out of a text of ours what is secret: see redaction.Secrets.
func Secrets(text string) string {
	text = redaction.Secrets(text)
	lower := strings.ToLower(text)
	if !strings.ContainsAny(text, "=:, ") || // one is in whatever those match
		!slices.ContainsFunc(words, func(w string) bool { return strings.Contains(lower, w) }) {
		return text // as most are: the expressions take a hundred times as long
	}
	for _, c := range called {
		text = c.what().ReplaceAllString(text, c.by)
	}
	return text
}

// Lines takes secrets out of lines of ours, and of programs that quote nobody.
func Lines(in []byte) ([]byte, error) { return eachLine(in, Secrets), nil }

// Names is Lines for Envoy's names and figures. A name may be a URL.
func Names(in []byte) ([]byte, error) {
	return eachLine(in, func(line string) string {
		return query().ReplaceAllString(Secrets(line), "")
	}), nil
}

var query = pattern(`\?[^\s:"]*`)

// Quoting takes out of a log what programs of others quote, too.
func Quoting(in []byte) ([]byte, error) { return eachLine(in, quoting), nil }

// header is how Envoy logs a request's header at level debug.
var header = pattern(`^('[^']*', )'.*'$`)

func quoting(line string) string {
	// It is of one line without space around it.
	rest := strings.TrimLeft(line, " \t")
	rest = header().ReplaceAllString(strings.TrimSpace(rest), "${1}'"+redaction.Mark+"'")
	return line[:len(line)-len(strings.TrimLeft(line, " \t"))] + Secrets(redaction.Text(rest))
}

// eachLine masks line by line, and private keys, which are lines in a row.
func eachLine(in []byte, change func(string) string) []byte {
	var out bytes.Buffer
	inKey := false
	for line := range bytes.Lines(in) {
		text := strings.TrimRight(string(line), "\r\n")
		text = strings.Map(printable, strings.ToValidUTF8(text, "\uFFFD"))
		begins := strings.Contains(text, "-----BEGIN") && strings.Contains(text, "PRIVATE KEY")
		switch {
		case inKey:
			inKey = !strings.Contains(text, "-----END")
			continue
		case keyLine().MatchString(text): // the line where it begins may be cut off
			text = redaction.Mark
		case begins:
			inKey = !strings.Contains(text, "-----END")
			text, _, _ = strings.Cut(text, "-----BEGIN")
			text = change(text) + redaction.Mark
		default:
			text = change(text)
		}
		out.WriteString(text)
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// keyLine is a line of a key, or of what else is base64 in lines.
var keyLine = pattern(`^\s*[A-Za-z0-9+/]{60,80}={0,2}$`)

// printable drops what would do something to the terminal of who reads it, or to the order in which
// that shows the text.
func printable(r rune) rune {
	if !unicode.IsGraphic(r) && r != '\t' {
		return -1
	}
	return r
}

// EnvoyLog masks Envoy's log. An entry of several lines quotes a configuration: what
// redaction.Text takes from it is kept, and the number of its lines.
func EnvoyLog(in []byte) ([]byte, error) {
	var out bytes.Buffer
	var entry []byte
	flush := func() {
		if len(entry) == 0 {
			return
		}
		first, rest, _ := bytes.Cut(bytes.TrimRight(entry, "\n"), []byte("\n"))
		if stamp().Match(first) || crash().Match(first) {
			line, _ := Quoting(first)
			out.Write(line)
		} else { // the end of an entry whose beginning is elsewhere
			rest = entry
		}
		if len(rest) > 0 {
			n := bytes.Count(rest, []byte("\n")) + 1
			if why := Secrets(redaction.Text(string(rest))); constraints().MatchString(why) {
				fmt.Fprintf(&out, "  [... %d lines] %s\n", n, strings.Map(printable, why))
			} else {
				fmt.Fprintf(&out, "  [%d more lines masked]\n", n)
			}
		}
		entry = entry[:0]
	}
	for line := range bytes.Lines(in) {
		if stamp().Match(line) || crash().Match(line) {
			flush()
		}
		entry = append(entry, line...)
	}
	flush()
	return out.Bytes(), nil
}

var (
	stamp = pattern(`^\[\d{4}-\d\d-\d\d `)
	// What is said by others than Envoy's logger when it cannot start or ends at once.
	crash = pattern(`^(terminate called|Segmentation|Aborted|Killed|double free|` +
		`\S*: (error while loading shared libraries|symbol lookup error)|` +
		`\S*tcmalloc|external/|source/)`)
	constraints = pattern(`^Proto constraint validation failed`)
)

// HTML masks the texts of a page and the values of its attributes, and leaves its tags as they are.
func HTML(in []byte) ([]byte, error) {
	return textOfPage().ReplaceAllFunc(in, func(found []byte) []byte {
		from, to := 1, len(found)-1
		if found[0] == '=' {
			from = 2
		}
		plain := html.UnescapeString(string(found[from:to]))
		if now := Secrets(plain); now != plain {
			return slices.Concat(found[:from], []byte(html.EscapeString(now)), found[to:])
		}
		return found
	}), nil
}

var textOfPage = pattern(`>[^<>]+<|="[^"<>]*"`)

// Environment masks a file of environment variables: only those that are known keep their value.
func Environment(known []string) func([]byte) ([]byte, error) {
	return func(in []byte) ([]byte, error) {
		all := envfile.Parse(string(in))
		var names []string
		for name := range all {
			names = append(names, name)
		}
		slices.Sort(names)
		var out bytes.Buffer
		for _, name := range names {
			value := mask(all[name])
			if slices.Contains(known, name) {
				value = clean(all[name])
			}
			fmt.Fprintf(&out, "%s=%q\n", nameOf(name), value)
		}
		return out.Bytes(), nil
	}
}

// Units masks units as `systemctl cat` prints them: a line that is in one of ours stays, and of
// what others wrote the values that cannot hold a secret.
func Units(ours [][]byte) func([]byte) ([]byte, error) {
	known := map[string]bool{}
	for _, text := range ours {
		for line := range strings.Lines(string(text)) {
			known[strings.TrimRight(line, "\n")] = true
		}
	}
	return func(in []byte) ([]byte, error) {
		continued := false // the line before goes on in this one, and is masked
		return eachLine(in, func(line string) string {
			next := strings.HasSuffix(line, `\`)
			kept := line
			if continued {
				kept = mask(line)
			} else if !known[line] {
				kept = unitLine(line)
			}
			continued = next && (continued || !known[line])
			return kept
		}), nil
	}
}

// unitFile is the line that `systemctl cat` puts before each file.
var unitFile = pattern(`^# /[\w./@\\:-]+$`)

func unitLine(line string) string {
	line = strings.TrimSpace(line)
	name, value, assigns := strings.Cut(line, "=")
	switch {
	case line == "", unitFile().MatchString(line), strings.HasPrefix(line, "[") && len(line) < 40:
		return Secrets(line)
	case strings.HasPrefix(line, "#"), strings.HasPrefix(line, ";"), !assigns:
		return mask(line)
	case harmless().MatchString(name) && !strings.HasSuffix(name, "Environment"):
		return name + "=" + Secrets(value)
	}
	return nameOf(name) + "=" + mask(value)
}

// harmless are the settings of a unit (systemd.directives(7)) whose values are words of systemd's,
// numbers, units, users and paths. No command, no variable, no credential.
var harmless = pattern(`^(After|Before|Wants|Requires|Requisite|BindsTo|PartOf|` +
	`Upholds|Conflicts|OnFailure|OnSuccess|WantedBy|RequiredBy|Also|Alias|(Condition|Assert)\w+|` +
	`(Start|Job)\w*(Limit|Timeout|Action)\w*|Type|NotifyAccess|Restart\w*|SuccessExitStatus|` +
	`(Timeout|Watchdog|RuntimeMax)\w*Sec|KillMode|KillSignal|SendSIGKILL|User|Group|DynamicUser|` +
	`SupplementaryGroups|Nice|CPU\w+|Memory\w+|Tasks\w+|IO\w+|Limit\w+|OOM\w+|Slice|Delegate|` +
	`Protect\w+|Private\w+|Restrict\w+|Read(Only|Write)Paths|InaccessiblePaths|BindPaths|` +
	`BindReadOnlyPaths|(Runtime|State|Cache|Logs|Configuration|Working|Root)Directory\w*|UMask|` +
	`CapabilityBoundingSet|AmbientCapabilities|NoNewPrivileges|SystemCall\w+|LockPersonality|` +
	`Standard(Input|Output|Error)|Syslog\w+|Log(Level|Rate)\w+|Device(Policy|Allow)|` +
	`IPAddress(Allow|Deny)|IPAccounting|EnvironmentFile|NetworkNamespacePath|` +
	`Path(Exists|Changed|Modified)\w*|Unit|On\w+Sec|OnCalendar|AccuracySec|Persistent|` +
	`DefaultDependencies|RefuseManual\w+|RemainAfterExit|KeyringMode|RemoveIPC)$`)
