package redaction

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// The texts of Envoy are captures: error_state.details, or the line of its log, of Envoy 1.40.0
// and 1.36.4 with these values in a header, a route's expression or a script. What older Envoys
// say is from their source (source/common/protobuf/utility.cc up to 1.30,
// source/common/router/header_parser.cc and header_formatter.cc up to 1.26).
func TestText(t *testing.T) {
	const message = `stat_prefix: "x"
route_config {
  virtual_hosts {
    routes {
      request_headers_to_add {
        header {
          key: "authorization"
          value: "Bearer s3cr3t: \"x\" error: a\nb | caused by Proto constraint validation failed (s3cr3t"
        }
        append_action: 99
      }
    }
  }
}
`
	const why = `Proto constraint validation failed (HttpConnectionManagerValidationError.RouteConfig: embedded message failed validation | caused by RouteConfigurationValidationError.VirtualHosts[0]: embedded message failed validation | caused by HeaderValueOptionValidationError.AppendAction: value must be one of the defined enum values)`
	const short = `Proto constraint validation failed (HttpConnectionManager.RouteConfig.VirtualHosts[0].AppendAction: value must be one of the defined enum values)`
	for _, test := range []struct{ name, text, want string }{
		{"1.40", "goo.gle/debugonly    \n" + message + ": " + why, short},
		{"1.40, another run", "goo.gle/debugproto   \n" + message + ": " + why, short},
		{"1.36", message + ": " + why, short},
		{"older", why + ": " + message, short},
		{"older, a value in its first line", why + `: value: "s3cr3t) s3cr3t)"`, short},
		{"two listeners", "Error adding/updating listener(s) a: goo.gle/debugonly    \n" + message + ": " + why + "\nb: goo.gle/debugonly    \n" + message +
			": Proto constraint validation failed (HttpConnectionManagerValidationError.StatPrefix: value length must be at least 1 characters)",
			short + "; Proto constraint validation failed (HttpConnectionManager.StatPrefix: value length must be at least 1 characters)"},
		// Said twice: by the log and, at the end, to standard error.
		{"the bootstrap, 1.40", "error `goo.gle/debugproto   \n" + message + ": " + why + "` initializing config 'goo.gle/debugproto   \n  boot.yaml'\ngoo.gle/debugproto   \n" + message + ": " + why, short},
		{"a line that was cut", "Proto constraint validation failed (AValidationError.B: embedded message", "Proto constraint validation failed (A.B: embedded message"},
		{"an expression", ": Proto constraint validation failed (HeaderValueValidationError.Key: value does not match regex pattern \"^[^\\x00\\n\\r]*$\")",
			"Proto constraint validation failed (HeaderValue.Key: value does not match regex pattern \"^[^\\x00\\n\\r]*$\")"},
		{"the log's line, 1.40", "goo.gle/debugonly    ", "[...]"},
		{"the log's line, 1.36", `value: "Bearer s3cr3t"`, `value: "[...]"`},
		{"the log's line, cut", `value: "s3cr3t \`, `value: "[...]"`},
		{"the log's line, a message within", "route_config {", "[...]"},
		{"a missing field, older", "Field 'cluster' is missing in: value: \"s3cr3t\"\nkey: \"s3cr3t\"\n", "Field 'cluster' is missing in: [...]"},
		{"a header's format", "Incorrect configuration: s3cr3t % x. Couldn't find valid command at position 14", "Incorrect configuration: [...]. Couldn't find valid command at position 14"},
		{"a header's variable", "Not supported field in StreamInfo: s3cr3t", "Not supported field in StreamInfo: [...]"},
		{"a script", `script load error: [string "function x( 's3cr3t'"]:1: <name> or '...' expected near ''s3cr3t''`, "script load error: [...]"},
		{"an expression of a route", "missing ): /s3cr3t*(", "missing ): [...]"},
		{"an expression of a query", "missing ]: [s3cr3t", "missing ]: [...]"},
		{"JSON", "Unable to parse JSON as proto (INVALID_ARGUMENT: invalid JSON in envoy.extensions.filters.http.lua.v3.Lua @ stat_prefix: string, near 1:16 (offset 15): unexpected character: '{'; expected '\"'): {\"stat_prefix\":{\"authorization\":\"s3cr3t\"}}",
			"Unable to parse JSON as proto (INVALID_ARGUMENT: invalid JSON in envoy.extensions.filters.http.lua.v3.Lua @ stat_prefix: string, near 1:16 (offset 15): unexpected character: '{'; expected '\"'): [...]"},
		{"a matcher", "filter chain 'a' has the same matching rules defined as 'b'. duplicate matcher is: {\"name\":\"s3cr3t\"}", "filter chain 'a' has the same matching rules defined as 'b'. duplicate matcher is: [...]"},
		{"a file's name", "file /nonexistent/Bearer s3cr3t does not exist", "file /nonexistent/Bearer [...] does not exist"},
		{"a configuration on the command line", "error `yaml-cpp: error at line 2` initializing config ' node: {id: x}\n authorization: s3cr3t '", "error `yaml-cpp: error at line 2` initializing config ' node: [...]"},
		// Said by Google's API front end; the first from a capture of `gcloud`, the others made up.
		{"a console's URL", "Enable it by visiting https://console.developers.google.com/apis/api/td/overview?project=1 then retry.", "Enable it by visiting https://console.developers.google.com/apis/api/td/overview then retry."},
		{"tokens", "no: ya29.s3cr3t-x, eyJs3cr3t.eyJx.y-_", "no: [...], [...]"},
		{"a redirect", `failed to parse Location header "/x%zz?X-Goog-Signature=s3cr3t&b": parse "/x%zz?X-Goog-Signature=s3cr3t&b": invalid URL escape "%zz"`,
			`failed to parse Location header "/x%zz": parse "/x%zz": invalid URL escape "%zz"`},
		{"a proxy", `invalid proxy address "http://u:s3cr3t@proxy:1/#s3cr3t": no`, `invalid proxy address "http://proxy:1/": no`},
	} {
		got := Text(test.text)
		if got != test.want {
			t.Errorf("%s:\n got %s\nwant %s", test.name, got, test.want)
		}
	}
	// What people need stays as it is.
	for _, text := range []string{
		"", "unable to open file '/var/log/envoy.log': Permission denied", ":-prefixed or host headers may not be modified",
		`Traffic Director configuration was not found for network "default" in project "123".`,
		"error adding listener: 'b' has duplicate address '127.0.0.1:15033' as existing listener", "malformed IP address: not-an-address",
		"Didn't find a registered implementation for 'http' with type URL: 'envoy.config.core.v3.HeaderValue'", "connect: [fd20:ce::254]:443: refused",
		"Invalid header configuration. Un-escaped % at position 7", "Invalid header configuration. Format string contains newline.",
		"basic auth: unsupported htpasswd format: please use {SHA}", "is it there? yes",
	} {
		if got := Text(text); got != text {
			t.Errorf("got %q of %q", got, text)
		}
	}
}

func TestSecrets(t *testing.T) {
	for text, want := range map[string]string{
		`key "a": Bearer ya29.s3cr3t of https://u:p@host/x?sig=s3cr3t`: `key "a": Bearer [...] of https://host/x`,
		`key: "value", {x}`: `key: "value", {x}`,
	} {
		if got := Secrets(text); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// Envoy up to 1.26 (the agent takes 1.24.9 and later) quotes a header's value whose % is no command
// in these words: of "Bearer %s3cr3t", "Bearer %s3cr3t(x" and the like.
func TestHeaderValueOlderEnvoy(t *testing.T) {
	for text, want := range map[string]string{
		"Un-terminated variable expression 's3cr3t'":                                                                      "Un-terminated variable expression [...]",
		"Un-terminated variable expression 's3cr3t isn't here'":                                                           "Un-terminated variable expression [...]",
		"Expecting '%' or whitespace after 's3cr3t(x)', but found 'y'":                                                    "Expecting [...]",
		"Expecting ')' or whitespace after 's3cr3t([\"x\"]', but found 'y'":                                               "Expecting [...]",
		`Expecting ',', ']', or whitespace after 's3cr3t(["x"', but found 'y'`:                                            "Expecting [...]",
		`Expecting '"' or whitespace after 's3cr3t([', but found 'y'`:                                                     "Expecting [...]",
		"Un-terminated backslash in JSON string after 's3cr3t(x'":                                                         "Un-terminated backslash in JSON string after [...]",
		"Expected format REQ(<header-name>), actual format REQs3cr3t":                                                     "Expected format REQ[...]",
		`Expected format UPSTREAM_METADATA(["namespace", "k", ...]), actual format UPSTREAM_METADATA(s3cr3t), because no`: "Expected format UPSTREAM_METADATA[...]",
	} {
		const start = "Error adding/updating listener(s) l: Invalid header configuration. "
		if got := Text(start + text); got != start+want {
			t.Errorf("got %s\nwant %s", got, start+want)
		}
	}
	if got := Text(
		"field 's3cr3t' not supported as custom header"); got != "field [...] not supported as custom header" {
		t.Errorf("got %s", got)
	}
}

// escape is what protobuf's text format does with a string (absl::CEscape).
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\t':
			b.WriteString(`\t`)
		case c == '"', c == '\'', c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\%03o`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// FuzzText: whatever a header's value is, it is in none of what is told of a configuration with it.
func FuzzText(f *testing.F) {
	f.Add("")
	f.Add("\n: Proto constraint validation failed (x")
	f.Add(`" Proto constraint validation failed (): \`)
	f.Add(". Couldn't find valid command at position 1 ")
	f.Add("' not supported as custom header")
	f.Fuzz(func(t *testing.T, value string) {
		const secret = "s3cr3t"
		quoted := escape(value + secret + value)
		message := "a {\n  value: \"" + quoted + "\"\n  key: \"x\"\n}\n"
		const why = "Proto constraint validation failed (AValidationError.B: value must be x)"
		format := strings.NewReplacer("\n", "", "\r", "").Replace(value) // a header's value has none
		texts := []string{
			"goo.gle/debugonly  \n" + message + ": " + why, message + ": " + why, why + ": " + message, why + ": value: \"" + quoted + "\"\n",
			"Error adding/updating listener(s) l: " + message + ": " + why, "value: \"" + quoted + "\"\n" + message + ": " + why,
			"goo.gle/debugonly  ", "value: \"" + quoted + "\"", "l: value: \"" + quoted, "Field 'f' is missing in: " + message,
			"Incorrect configuration: " + format + secret + format + ". Couldn't find valid command at position 4",
			"Invalid header configuration. Un-terminated variable expression '" + format + secret + format + "'",
			"Invalid header configuration. Expecting '%' or whitespace after '" + format + secret + format + "', but found 'x'",
			"l: field '" + format + secret + format + "' not supported as custom header",
			"Not supported field in StreamInfo: " + format + secret + format,
			"Unable to parse JSON as proto (why): {\"a\":\"" + quoted + "\"}",
		}
		for _, text := range texts {
			got := Text(text)
			if strings.Contains(got, secret) {
				t.Errorf("of %q it tells %q", text, got)
			}
			if strings.Contains(text, why) && !strings.Contains(got, "A.B: value must be x") {
				t.Errorf("of %q it tells %q, which lacks the constraint", text, got)
			}
		}
		for _, text := range append(texts, value) {
			got := Text(text)
			if again := Text(got); again != got {
				t.Errorf("of %q it tells %q, and of that %q", text, got, again)
			}
			if strings.Contains(got, "\n") || utf8.ValidString(text) && !utf8.ValidString(got) {
				t.Errorf("of %q it tells %q", text, got)
			}
		}
	})
}
