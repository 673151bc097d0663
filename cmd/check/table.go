package main

import (
	"errors"
	"fmt"
)

// unknownError says why a feature could not be tried: something else is not there.
type unknownError string

func (e unknownError) Error() string { return string(e) }

// printLine prints the line of a feature: MISSING is what calls need.
func printLine(f feature, seen string, err error) {
	word := "ok"
	if unknown := unknownError(""); errors.As(err, &unknown) {
		word, seen = "unknown", unknown.Error()
	} else if err != nil {
		word, seen = "missing", err.Error()
		if f.needed {
			word = "MISSING"
		}
	}
	fmt.Printf("%-8s %-45s %s\n", word, f.name, seen)
	if word == "missing" || word == "MISSING" {
		fmt.Printf("%8s -> %s\n", "", f.advice)
	}
}
