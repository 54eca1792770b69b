package terminal

import "testing"

func TestColumns(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "plain": 5, "\x1b[31mred\x1b[0m": 3, "名前": 4, "é": 1, "e\u0301": 1, "\x1b[": 2, "…": 1, "😀": 2,
		"\xff": 1,
	} {
		if have := Columns(text); have != want {
			t.Errorf("%q: %d columns, want %d", text, have, want)
		}
	}
}

func TestCut(t *testing.T) {
	for _, tt := range []struct {
		text  string
		width int
		want  string
	}{
		{"fits", 4, "fits"}, {"does not", 5, "does…"}, {"名前名前", 8, "名前名前"}, {"名前名前", 7, "名前名…"},
		{"名前名前", 6, "名前…"}, {"", 3, ""},
	} {
		if have := Cut(tt.text, tt.width); have != tt.want {
			t.Errorf("%q in %d: %q, want %q", tt.text, tt.width, have, tt.want)
		}
	}
}
