package main

import (
	"errors"
	"fmt"
	"strings"
)

// unknownError says why a feature could not be checked: something that it depends on is missing.
type unknownError string

func (e unknownError) Error() string { return string(e) }

// report counts the printed results, and keeps what is printed at the end.
type report struct {
	missing int // features that calls need
	unknown int // needed features that could not be checked
	causes  []unknownError
	untried map[unknownError][]string
}

// add prints a feature's line. MISSING marks the features that calls need. Features that could not be checked are printed at the end, by
// cause.
func (r *report) add(f feature, seen string, err error) {
	if cause := unknownError(""); errors.As(err, &cause) {
		if r.untried[cause] == nil {
			r.causes = append(r.causes, cause)
		}
		r.untried[cause] = append(r.untried[cause], f.name)
		if f.needed {
			r.unknown++
		}
		return
	}
	word := "ok"
	if err != nil {
		word, seen = "missing", err.Error()
		if f.needed {
			word = "MISSING"
			r.missing++
		}
	}
	fmt.Printf("%-8s %-45s %s\n", word, f.name, seen)
	if err != nil {
		fmt.Printf("%8s -> %s\n", "", f.advice)
	}
}

// works reports whether every feature that calls need is there.
func (r *report) works() bool { return r.missing+r.unknown == 0 }

// summary prints the features that could not be checked, by cause, and the result.
func (r *report) summary() {
	for _, cause := range r.causes {
		names := r.untried[cause]
		fmt.Printf("\nunknown  %d of %d: %s\n", len(names), len(features), cause)
		fmt.Printf("%9s%s\n", "", wrap("not tried: ", names))
	}
	switch {
	case r.works():
		fmt.Println("\nCalls work: all that they need is there.")
	case r.missing == 0:
		fmt.Printf("\nCalls may work. Of what they need: 0 missing, %d not tried.\n", r.unknown)
	default:
		fmt.Printf("\nCalls do not work. Of what they need: %d missing, %d not tried.\n", r.missing, r.unknown)
	}
}

// wrap joins names in lines of about a hundred columns.
func wrap(text string, names []string) string {
	column := len(text)
	for i, name := range names {
		if i < len(names)-1 {
			name += ";"
		}
		if column += len(name) + 1; column > 100 {
			text, column = strings.TrimRight(text, " ")+"\n         ", len(name)+1
		}
		text += name + " "
	}
	return strings.TrimRight(text, " ")
}
