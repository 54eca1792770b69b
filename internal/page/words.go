package page

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// number is 12345 as 12,345.
func number[T ~int | ~uint64 | ~uint16](n T) string {
	digits := strconv.FormatUint(uint64(n), 10)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// numberOf is "1 service", "2 services".
func numberOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	if strings.HasSuffix(what, "x") {
		what += "e"
	}
	return number(n) + " " + what + "s"
}

// short is a number in few digits: "1.22 M".
func short(n uint64) string {
	switch {
	case n < 1e6:
		return number(n)
	case n < 1e9:
		return threeDigits(float64(n)/1e6) + " M"
	}
	return threeDigits(float64(n)/1e9) + " G"
}

// seconds is a time in three digits at most: "31 ms", "1.5 s".
func seconds(s float64) string {
	switch {
	case s <= 0:
		return "0 s"
	case s < 0.0000995:
		return threeDigits(s*1e6) + " µs"
	case s < 0.9995:
		return threeDigits(s*1e3) + " ms"
	case s < 120:
		return threeDigits(s) + " s"
	}
	return threeDigits(s/60) + " min"
}

func threeDigits(v float64) string {
	digits := 2
	for bound := 9.995; digits > 0 && v >= bound; bound *= 10 {
		digits--
	}
	text := strconv.FormatFloat(v, 'f', digits, 64)
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	return text
}

// bytesOf is a size: "31 MB".
func bytesOf(n uint64) string {
	const unit = 1000
	v, units := float64(n), []string{"B", "kB", "MB", "GB", "TB"}
	for len(units) > 1 && v >= unit {
		v, units = v/unit, units[1:]
	}
	return threeDigits(v) + " " + units[0]
}

// percent is a share.
func percent(share float64) string {
	switch {
	case share <= 0:
		return "0 %"
	case share < 0.0001:
		return "< 0.01 %"
	}
	return threeDigits(share*100) + " %"
}

// span is how long something has lasted: "40 s", "5 min", "3 h 20 min", "4 days".
func span(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 24*time.Hour:
		if m := int(d.Minutes()) % 60; m > 0 {
			return fmt.Sprintf("%d h %d min", int(d.Hours()), m)
		}
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return numberOf(int(d.Hours())/24, "day")
}

// at is a time for people, with what programs read. Of the day of now the day is left out.
func at(now, t time.Time) element {
	now, t = now.UTC(), t.UTC()
	form := "2 Jan 2006, 15:04:05"
	switch {
	case now.Format(time.DateOnly) == t.Format(time.DateOnly):
		form = "15:04:05"
	case now.Year() == t.Year():
		form = "2 Jan, 15:04:05"
	}
	return el("time", attr{"datetime", t.Format(time.RFC3339)}, t.Format(form))
}

// ago is a time and how long that is ago; "never" for none.
func ago(now, t time.Time) any {
	if t.IsZero() {
		return "never"
	}
	return several{at(now, t), el("span", class("note"), " "+span(now.Sub(t))+" ago")}
}

// nice is the least of 1, 2, 5 times a power of ten that is not below v.
func nice(v float64) float64 {
	if v <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, step := range []float64{1, 2, 5} {
		if v <= step*power*(1+1e-9) {
			return step * power
		}
	}
	return 10 * power
}
