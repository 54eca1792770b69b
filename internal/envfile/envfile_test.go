package envfile

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"":                              {},
		"A=b":                           {"A": "b"},
		"A=b\nA=c\n":                    {"A": "c"},
		"A=b\r\nB=c\r\n":                {"A": "b", "B": "c"},
		"  A =  b c \t\n":               {"A": "b c"},
		"A=":                            {"A": ""},
		"A=\nB=c":                       {"A": "", "B": "c"},
		"# A=b\n;B=c\n\nC=d # e\n":      {"C": "d # e"},
		"# a \\\nA=b\nB=c":              {"B": "c"},
		"no assignment\nA=b\nnor this":  {"A": "b"},
		"A=a\\\nb\nB=c":                 {"A": "ab", "B": "c"},
		"A=a\\ b\\\\c\\\"d\n":           {"A": `a b\c"d`},
		"A=\"a b \"\n":                  {"A": "a b "},
		"A='a b \\n $x \"'\n":           {"A": `a b \n $x "`},
		"A=\"a\\\"b\\\\c\\$d\\n\\\ne\"": {"A": `a"b\c$d\ne`},
		"A=\"a\nb\"\nB=c":               {"A": "a\nb", "B": "c"},
		"A='a' 'b'\"c\"\n":              {"A": "abc"},
		"A=a'b'\"c\"\n":                 {"A": `a'b'"c"`},
		"export A=b":                    {"export A": "b"},
		"A=\"a":                         {"A": "a"},
		"A=b=c":                         {"A": "b=c"},
	} {
		if diff := cmp.Diff(want, Parse(text)); diff != "" {
			t.Errorf("%q (-want +have):\n%s", text, diff)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("A=\"b\\\n\" 'c'\\")
	f.Fuzz(func(t *testing.T, text string) { Parse(text) })
}
