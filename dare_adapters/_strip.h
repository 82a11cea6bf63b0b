/* Loops of several steps go through so many entries at a time, in the first-level cache. */

#ifndef DARE_STRIP_H
#define DARE_STRIP_H

enum { STRIP = 1024 };

#endif
