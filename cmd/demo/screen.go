package main

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// width is the width that every line fits into.
const width = 80

// screen prints which participant sees what, and when. During a wait, the last line of a terminal counts the time.
type screen struct {
	terminal bool
	start    time.Time

	mu      sync.Mutex // guards waiting and the output
	waiting string
}

func newScreen() *screen {
	return &screen{terminal: term.IsTerminal(int(os.Stdout.Fd())), start: time.Now()}
}

// restart sets the clock of the lines to 0.
func (s *screen) restart() { s.start = time.Now() }

// title begins a scene.
func (s *screen) title(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Printf("\n%s\n", text)
}

// say prints what a participant does or sees.
func (s *screen) say(who, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line(fmt.Sprintf("%6.1fs  %-6s %s", time.Since(s.start).Seconds(), who, fmt.Sprintf(format, args...)))
}

// event shows an event as the server sent it.
func (s *screen) event(caption string, event any) error {
	data, err := json.MarshalIndent(event, "    ", "  ")
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line("")
	s.line("    " + caption)
	s.line("    " + string(data))
	s.line("")
	return nil
}

// line prints a line over the progress line, if there is one. The caller holds the lock.
func (s *screen) line(text string) {
	if s.terminal && s.waiting != "" {
		fmt.Printf("\r%*s\r", width-1, "")
	}
	fmt.Println(text)
}

// during calls f, and shows progress meanwhile.
func (s *screen) during(what string, f func() error) error {
	s.mu.Lock()
	s.waiting = what
	s.mu.Unlock()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		s.progress(stop)
	}()
	err := f()
	close(stop)
	<-stopped
	return err
}

// progress updates the last line of a terminal. Elsewhere it prints a note, once, if the wait is long.
func (s *screen) progress(stop <-chan struct{}) {
	const long = 2 * time.Second
	begun, said := time.Now(), s.terminal
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.mu.Lock()
			if s.terminal {
				fmt.Printf("\r         ...    %.50s %.1fs", s.waiting, time.Since(begun).Seconds())
			} else if !said && time.Since(begun) > long {
				fmt.Printf("         ...    %s\n", s.waiting)
				said = true
			}
			s.mu.Unlock()
		case <-stop:
			s.mu.Lock()
			if s.terminal {
				fmt.Printf("\r%*s\r", width-1, "")
			}
			s.waiting = ""
			s.mu.Unlock()
			return
		}
	}
}
