package main

import (
	"encoding/json"
	"fmt"
	"sync"
	"time"
)

// screen prints which participant sees what, and when. Every line fits into 80 columns.
type screen struct {
	mu    sync.Mutex // guards start, and prints one line at a time
	start time.Time
}

// restart sets the clock of the lines to 0.
func (s *screen) restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start = time.Now()
}

func (s *screen) print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Printf(format, args...)
}

// title begins a scene.
func (s *screen) title(text string) { s.print("\n%s\n", text) }

// say prints what a participant does or sees.
func (s *screen) say(who, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Printf("%6.1fs  %-6s %s\n", time.Since(s.start).Seconds(), who, fmt.Sprintf(format, args...))
}

// event shows an event as the server sent it.
func (s *screen) event(caption string, event any) error {
	data, err := json.MarshalIndent(event, "    ", "  ")
	if err == nil {
		s.print("\n    %s\n    %s\n\n", caption, data)
	}
	return err
}

// during calls f, and says what the wait is for if it is long.
func (s *screen) during(what string, f func() error) error {
	note := time.AfterFunc(2*time.Second, func() { s.print("         ...    %s\n", what) })
	defer note.Stop()
	return f()
}
